"""`import sparseq` is all that the Auto classes need."""

import importlib
import subprocess
import sys

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoModelForTextEncoding, AutoTokenizer

import sparseq
from tests.tiny import tiny_config


def test_auto_classes_know_every_class() -> None:
    config = AutoConfig.for_model(**tiny_config().to_diff_dict())
    assert type(config) is sparseq.SparseqConfig
    assert type(AutoModel.from_config(config)) is sparseq.SparseqModel
    assert type(AutoModelForSeq2SeqLM.from_config(config)) is sparseq.SparseqForConditionalGeneration
    assert type(AutoModelForTextEncoding.from_config(config)) is sparseq.SparseqEncoderModel
    assert transformers.models.auto.tokenization_auto.TOKENIZER_MAPPING[sparseq.SparseqConfig] is not None


def test_importing_again_is_harmless() -> None:
    # In a process of its own: a reload makes new classes, which other tests must not meet.
    code = (
        "import importlib, sys, sparseq; importlib.reload(sparseq);"
        "[sys.modules.pop(n) for n in list(sys.modules) if n.startswith('sparseq')]; import sparseq;"
        "from transformers import AutoModel;"
        "config = sparseq.SparseqConfig(d_model=32, vocab_size=50, encoder_layers=2, decoder_layers=2,"
        "encoder_ffn_dim=32, decoder_ffn_dim=32);"
        "assert type(AutoModel.from_config(config)) is sparseq.SparseqModel"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_plugins_are_left_alone() -> None:
    class OtherConfig(transformers.PreTrainedConfig):
        model_type = "other-plugin"

    class OtherModel(transformers.PreTrainedModel):
        config_class = OtherConfig

        def __init__(self, config: OtherConfig) -> None:
            super().__init__(config)
            self.post_init()

    AutoConfig.register("other-plugin", OtherConfig)
    AutoModel.register(OtherConfig, OtherModel)
    importlib.import_module("sparseq")
    assert type(AutoModel.from_config(OtherConfig())) is OtherModel
    assert type(AutoModel.from_config(tiny_config())) is sparseq.SparseqModel


def test_the_library_tokenizers_are_still_found() -> None:
    assert AutoTokenizer.from_pretrained is not None
    mapping = transformers.models.auto.tokenization_auto.TOKENIZER_MAPPING
    assert mapping[transformers.BartConfig].__name__.startswith(("Roberta", "Bart", "Tokenizers"))
