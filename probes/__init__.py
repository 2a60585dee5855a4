"""Everything that brings data in: BPF objects, rings, target discovery and wire decoders."""
