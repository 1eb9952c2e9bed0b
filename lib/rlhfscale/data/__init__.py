"""Training sets made from the task universe: documents to imitate and labelled responses to compare."""
