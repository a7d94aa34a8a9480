"""Everything that touches moshi's modules: sources, memory and LoRA inside them, their rings."""
