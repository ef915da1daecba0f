"""The fit check: what a run would need of chips that are not there."""
