"""The operations: checks, schema, fake, autograd and the table of backends, one file each."""
