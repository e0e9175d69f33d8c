"""From pairs to reward models: a start with a head, its linear probe, members that are fine-tuned from it."""
