"""Graphs in files and copies: as data, by names that go on to be found, and as earlier versions have written them."""
