"""`sparseq pretrain`: pre-train a model on plain text from a recipe."""

import argparse
from pathlib import Path

_DESCRIPTION = """\
Pre-train a sequence-to-sequence model on plain text: parts of the text are taken out, and the model restores them. Any
recipe gives the model, the tokenizer and the schedule; its sections text and denoising say what is read and what is
learned. Trains the tokenizer, packs the text into pieces, makes the noise on the fly (the same for the same seed, new
in every epoch), and writes a folder that `sparseq train finetune start.checkpoint=...` goes on from.

An interrupted run continues from its last complete checkpoint when the same command is given again.
"""

_EPILOG = """\
examples:
  sparseq pretrain pretrain-tiny text.folder=corpus text.languages=[en,de] --output outputs/pretrained
      learn from corpus/train.en and corpus/train.de (or .gz), one text a line, which need not be translations
  sparseq pretrain pretrain-tiny text.folder=corpus text.languages=[en,de] --dry-run
      check the recipe and the text, print sizes and schedule; train nothing
  sparseq pretrain pretrain-tiny "text.files={en: [a.txt, b.txt.gz], de: c.jsonl}" text.column=body
      files of any name; tables have the text in a column
  sparseq pretrain pretrain-tiny text.dataset=wikimedia/wikipedia text.dataset_config=20231101.eo text.languages=[eo]
      a dataset of the Hub
  sparseq pretrain base-sparse text.folder=corpus text.languages=[en,de] denoising.objective=text_infilling
      the model of another recipe, with BART's objective instead of T5's
  sparseq pretrain finetune start.checkpoint=outputs/pretrained text.folder=more text.languages=[en]
      go on from a trained model; its architecture and tokenizer stay
  sparseq train finetune start.checkpoint=outputs/pretrained data.folder=corpus data.source=en data.target=de
      then: fine-tune the result on parallel text

in the output folder: model.safetensors, config.json, tokenizer.json, generation_config.json, results.json (losses,
seconds), manifest.json (versions, commit, seed, hashes of the text, recipe), checkpoints/ and cache/ (tokens; delete
both when you are done).
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the sub-command."""
    from sparseq.training.train_command import add_run_arguments

    parser = subparsers.add_parser(
        "pretrain",
        help="pre-train a model on plain text",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Do what the arguments ask for; returns the exit status."""
    from sparseq.training.train_command import read_recipe

    recipe = read_recipe(args, "pretrain-tiny")
    if recipe is None:
        return 0
    if args.dry_run:
        from sparseq.training.summary import describe_pretraining

        print(describe_pretraining(recipe))
        return 0

    from accelerate import PartialState

    from sparseq.training.pretrain import pretrain

    output = args.output or Path("outputs") / recipe.name
    result = pretrain(recipe, output, resume=not args.no_resume)
    # Every process of a distributed run gets here; one of them speaks.
    if PartialState().is_main_process:
        for language, loss in result.languages.items():
            print(f"{language:12}validation loss {loss:.3f}")
        print(f"validation loss {result.validation_loss:.3f}")
        print("seconds: " + ", ".join(f"{part} {value:.1f}" for part, value in result.seconds.items()))
        print(f"The model is in {output}. To fine-tune it: sparseq train finetune start.checkpoint={output} ...")
    return 0
