"""The tests, in the folders of the packages that they test; the networks in zoo, the oracles in oracles."""
