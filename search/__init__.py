"""Evolution under limits, Ray workers, the record, export, verification, reports, the command line."""
