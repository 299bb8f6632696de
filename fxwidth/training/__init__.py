"""The main job: evolve a classification network while it trains; used by the `fxwidth train` command."""
