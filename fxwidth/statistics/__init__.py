"""Moments of activations, from data or from synthetic inputs."""
