"""A user of huggingface_hub, in a process of its own: makes calls one after the other and writes down what came back.

    python -I api_client.py < CALLS.json > RESULTS.json

CALLS.json: [["name of a method of HfApi", {its arguments}], ...]. A result is what the method returned, objects as
their attributes, or {"error": class, "message": text}.
"""

import json
import sys
from typing import Any

from huggingface_hub import HfApi


def call(api: HfApi, method: str, arguments: dict[str, Any]) -> Any:
    try:
        result = getattr(api, method)(**arguments)
        # Some results are strings with attributes, which JSON would take for mere strings.
        return vars(result) if hasattr(result, "__dict__") else result
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}


def plain(value: Any) -> Any:
    """What JSON has no word for."""
    return vars(value) if hasattr(value, "__dict__") else str(value)


def main() -> None:
    api = HfApi()
    results = [call(api, method, arguments) for method, arguments in json.load(sys.stdin)]
    json.dump(results, sys.stdout, default=plain)


if __name__ == "__main__":
    main()
