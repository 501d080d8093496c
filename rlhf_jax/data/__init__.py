"""From files to batches: records, the ledger, dialogues, encoding, packing, batches."""
