"""The harness: treats a model as a black box, trains it, measures it and reports."""
