"""A user of a model folder, in a process of its own: loads it, runs it, saves it again, and writes down what it saw.

    python -I client.py JOBS.json RESULTS.json

JOBS.json: {"without_package": bool, "import_package": bool, "inputs": file, "jobs": [{"auto_class": name,
"folder": path or repository, "trust": bool, "options": {further arguments of from_pretrained}, "save": path,
"save_options": {further arguments of save_pretrained}, "push": repository, "push_options": {further arguments of
push_to_hub}}, ...]}. A name that begins with AutoPeft is one of peft. Each job's result has "class", "module", "code"
(SHA-256 of the file that defines the class) and "outputs" (a safetensors file), or "error".
"""

import hashlib
import importlib.abc
import json
import sys
from pathlib import Path
from typing import Any


class Blocker(importlib.abc.MetaPathFinder):
    """Makes `sparseq` as good as not installed."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.partition(".")[0] == "sparseq":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def observe(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """What the model computes: logits and greedy output, or hidden states."""
    import torch

    model.eval()
    source = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    with torch.no_grad():
        if model.can_generate():
            logits = model(**source, decoder_input_ids=inputs["decoder_input_ids"]).logits
            return {"logits": logits, "generated": model.generate(**source, max_new_tokens=8)}
        if hasattr(model, "decoder"):
            return {"states": model(**source, decoder_input_ids=inputs["decoder_input_ids"]).last_hidden_state}
        return {"states": model(**source).last_hidden_state}


def run(job: dict[str, Any], inputs: dict[str, Any], outputs: Path) -> dict[str, Any]:
    import transformers
    from safetensors.torch import save_file

    library: Any = transformers
    if job["auto_class"].startswith("AutoPeft"):
        import peft

        library = peft
    auto_class = getattr(library, job["auto_class"])
    kwargs = {**job.get("options", {}), **({"trust_remote_code": True} if job.get("trust") else {})}
    try:
        loaded = auto_class.from_pretrained(job["folder"], **kwargs)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    module = sys.modules[type(loaded).__module__]
    result = {"class": type(loaded).__name__, "module": module.__name__, "code": sha256(module.__file__)}
    if job["auto_class"] == "AutoTokenizer":
        result["ids"] = loaded(job["texts"])["input_ids"]
        result["label_ids"] = loaded(text_target=job["texts"])["input_ids"]
        result["texts"] = loaded.batch_decode(result["ids"], skip_special_tokens=True)
    else:
        save_file({name: tensor.contiguous() for name, tensor in observe(loaded, inputs).items()}, outputs)
        result["outputs"] = str(outputs)
    if job.get("save"):
        loaded.save_pretrained(job["save"], **job.get("save_options", {}))
    if job.get("push"):
        loaded.push_to_hub(job["push"], **job.get("push_options", {}))
    return result


def sha256(path: str | None) -> str:
    return hashlib.sha256(Path(path or "").read_bytes()).hexdigest()


def main() -> None:
    job_file, result_file = map(Path, sys.argv[1:])
    task = json.loads(job_file.read_text("utf-8"))
    if task["without_package"]:
        sys.meta_path.insert(0, Blocker())
    elif task["import_package"]:
        import sparseq  # noqa: F401

    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    inputs = load_file(task["inputs"])
    results = [run(job, inputs, result_file.with_suffix(f".{i}.safetensors")) for i, job in enumerate(task["jobs"])]
    loaded = sorted(name for name in sys.modules if name.partition(".")[0] == "sparseq")
    result_file.write_text(json.dumps({"results": results, "package_modules": loaded}), "utf-8")


if __name__ == "__main__":
    main()
