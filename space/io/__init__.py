"""Reading and writing of files: artefacts, tables and YAML; errors; progress."""
