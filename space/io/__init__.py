"""Reading and writing files: artefacts, tables, YAML, and the errors that a wrong file raises."""
