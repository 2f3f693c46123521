"""`pipeline("sparseq-translation", model=...)`: a `Translator` behind the interface of the library's pipelines.

`import sparseq` registers the task; this module is imported when somebody asks for it.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import Pipeline, PreTrainedModel

from sparseq.translation.results import Translation
from sparseq.translation.runtimes import Precision, Runtime
from sparseq.translation.translator import Translator


class SparseqTranslationPipeline(Pipeline):
    """Translates a text, a list of texts, or a generator or dataset of them.

    ```python
    translate = pipeline("sparseq-translation", model="outputs/tiny", num_beams=4)
    translate("A man walks.")  # [{"translation_text": "...", "score": -0.4}]
    ```

    A text gives a list with a dictionary for each of its `num_return_sequences` translations. Of several texts each
    gives a dictionary, or such a list if there are more than one; generators and datasets are read in windows, and
    give an iterator. Arguments of `Translator.translate` are taken here, as defaults, and by each call; batches are
    filled by `batch_tokens`, so `batch_size` and `num_workers` have no effect.

    Args:
        model: The model, which is on the pipeline's device.
        tokenizer: The model's.
        runtime: "torch" runs the model that the pipeline has. "onnx" and "auto" run the checkpoint that it came from,
            as `Translator.from_pretrained` does.
        precision, threads, cache_dir: As for `Translator.from_pretrained`, with another runtime than "torch".
        options: Of `Pipeline`, and of `Translator.translate`.

    Raises:
        ValueError: As `Translator.from_pretrained`, or the model came from no checkpoint.
    """

    # Annotated, since the base class is taken to have none of them ever.

    _load_processor: Any = False
    _load_image_processor: Any = False
    _load_video_processor: Any = False
    _load_feature_extractor: Any = False
    _load_tokenizer: Any = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        runtime: Runtime = "torch",
        precision: Precision = "float32",
        threads: int | None = None,
        cache_dir: str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, **options)
        if runtime == "torch" and precision == "float32" and threads is None and cache_dir is None:
            self._translator = Translator.from_model(model, tokenizer)
            return
        checkpoint = model.config.name_or_path
        if not checkpoint:
            raise ValueError(
                "The model came from no checkpoint, which `runtime`, `precision`, `threads` and `cache_dir` are for: "
                "save it, and give the pipeline its folder."
            )
        device = self.device if runtime == "torch" else "cpu"
        self._translator = Translator.from_pretrained(
            checkpoint,
            runtime=runtime,
            precision=precision,
            device=device,
            threads=threads,
            cache_dir=cache_dir,
        )

    def _sanitize_parameters(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return {}, options, {}

    def preprocess(self, input_: str, **_: Any) -> dict[str, Any]:
        """The translator does what pipelines do here."""
        return {"text": input_}

    def _forward(self, input_tensors: dict[str, Any], **options: Any) -> Any:
        return self._translator.translate(input_tensors["text"], **options)

    def postprocess(self, model_outputs: Any, **_: Any) -> list[dict[str, Any]]:
        """A dictionary for each hypothesis."""
        translation: Translation = model_outputs
        return [{"translation_text": one.text, "score": one.score} for one in translation.hypotheses]

    def get_iterator(
        self,
        inputs: Iterable[str],
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[Any]:
        """Translations of several texts, in order; pipelines would take them one by one."""
        for translation in self._translator.translate_lines(inputs, **forward_params):
            records = self.postprocess(translation)
            yield records[0] if len(records) == 1 else records
