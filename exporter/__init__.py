"""Everything that makes sense of the data and hands it out: SLIs, exposition and commands."""
