"""What goes to the Hub: self-contained model folders and their model cards."""
