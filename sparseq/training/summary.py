"""What a recipe amounts to, without training: sizes, memory, schedule, and the data if it is there."""

import tempfile
from pathlib import Path

from sparseq.training.recipes import Recipe

_BYTES_PER_TRAINED_PARAMETER = 16
"""Weight, gradient and the two moments of Adam, in float32."""


def describe(recipe: Recipe) -> str:
    """Several lines about the model, the batches, the schedule and the data of `recipe`.

    Raises:
        ValueError: The recipe names no data or defective data.
        FileNotFoundError: A data file is missing.
    """
    config = recipe.model_config()
    total, active = config.num_parameters(), config.num_parameters(active=True)
    training = recipe.training
    update = training.tokens_per_batch * training.gradient_accumulation_steps
    lines = [
        f"recipe      {recipe.name}: {recipe.description}",
        f"model       {total:,} parameters, {active:,} active per token (vocabulary {config.vocab_size:,})",
        # Kaplan et al. 2020, section 2.1: 2 multiply-adds a parameter forward, twice that backward.
        f"compute     about {6 * active:,} FLOPs a token in training, attention scores not counted",
        f"memory      {_BYTES_PER_TRAINED_PARAMETER * total / 2**20:,.0f} MiB for weights, gradients and Adam, "
        "activations on top",
        f"batches     {training.tokens_per_batch:,} {training.budget_counts} tokens x "
        f"{training.gradient_accumulation_steps} = {update:,} an update and device",
        f"schedule    {training.max_steps:,} updates, {training.lr_scheduler}, peak {training.learning_rate:g} after "
        f"{training.warmup_steps:,}; the last {training.average_checkpoints} checkpoints, "
        f"{training.save_steps:,} updates apart, are averaged",
        f"decoding    beam {recipe.decoding.num_beams}, at most {recipe.decoding.max_length} tokens",
    ]
    return "\n".join([*lines, *_describe_data(recipe, update)])


def _describe_data(recipe: Recipe, update: int) -> list[str]:
    from sparseq.training.run import locate_data, read_splits

    with tempfile.TemporaryDirectory() as scratch:
        data = locate_data(recipe, Path(scratch))
        texts = read_splits(data)
    lines = []
    for text in texts.values():
        words = [sum(len(line.split()) for line in side) / max(1, len(side)) for side in (text.sources, text.targets)]
        lines.append(f"data        {text.report}; {words[0]:.1f} and {words[1]:.1f} words a sentence")
    # Subwords are not known before the tokenizer is trained, so this is in words.
    target_words = sum(len(line.split()) for line in texts[data.train].targets)
    epochs = recipe.training.max_steps * update / max(1, target_words)
    lines.append(f"epochs      at most {epochs:,.1f} (a word has one token or more)")
    return lines
