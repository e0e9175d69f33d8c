"""The whole story on a tiny world, by the commands that users type: `warmerge demo`."""
