"""Results on file: the record, its environment, collections of records, statistics, the literature."""
