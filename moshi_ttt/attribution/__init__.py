"""Why a generation changes: controlled experiments, evidence and verdict."""
