"""Readers and writers of foreign text formats (HL7 v2). Pure functions over bytes; no I/O."""
