"""From a recipe to a record: model, optimiser, stages, callbacks, checkpoints, devices."""
