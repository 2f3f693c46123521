"""Sparseq: a modern encoder-decoder Transformer for the Hugging Face ecosystem."""

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoModelForTextEncoding, AutoTokenizer
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_sparseq import SparseqConfig
from .modeling_sparseq import (
    SparseqEncoderModel,
    SparseqForConditionalGeneration,
    SparseqModel,
    SparseqPreTrainedModel,
)
from .quantization_sparseq import SparseqInt8Config
from .tokenization_sparseq import SparseqTokenizer

__version__ = "0.1.0"

# `exist_ok`: importing twice, as a reload or a second copy of the package does, is harmless.
AutoConfig.register("sparseq", SparseqConfig, exist_ok=True)
AutoModel.register(SparseqConfig, SparseqModel, exist_ok=True)
AutoModelForSeq2SeqLM.register(SparseqConfig, SparseqForConditionalGeneration, exist_ok=True)
AutoModelForTextEncoding.register(SparseqConfig, SparseqEncoderModel, exist_ok=True)
AutoTokenizer.register(SparseqConfig, fast_tokenizer_class=SparseqTokenizer, exist_ok=True)

# As the library lists its own: by name, so that the class is imported when it is asked for. `register_pipeline` takes
# only classes.
PIPELINE_REGISTRY.supported_tasks["sparseq-translation"] = {
    "impl": "sparseq.translation.pipeline.SparseqTranslationPipeline",
    "pt": (AutoModelForSeq2SeqLM,),
    "type": "text",
}

__all__ = [
    "SparseqCallback",
    "SparseqConfig",
    "SparseqEncoderModel",
    "SparseqForConditionalGeneration",
    "SparseqInt8Config",
    "SparseqModel",
    "SparseqPreTrainedModel",
    "SparseqTokenizer",
    "Translator",
    "__version__",
]


def __getattr__(name: str) -> Any:
    # Loaded when they are asked for: they bring packages that using a model does not need.
    if name == "SparseqCallback":
        from .training.callback import SparseqCallback

        return SparseqCallback
    if name == "Translator":
        from .translation.translator import Translator

        return Translator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
