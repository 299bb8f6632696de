"""From a model to an fx graph that does in train and eval mode what the model does."""
