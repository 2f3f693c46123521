"""Training of tokenizers and models: recipes, trainers and the commands that run them."""
