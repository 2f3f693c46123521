"""Fast translation: `Translator`, the engines that it runs on and the `sparseq translate` command."""
