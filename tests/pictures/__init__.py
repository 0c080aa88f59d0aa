"""Pictures of token reduction, and which of them a run gets."""
