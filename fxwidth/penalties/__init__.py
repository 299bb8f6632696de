"""Terms to add to a loss in training, so that later resizes lose less."""
