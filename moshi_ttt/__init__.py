"""A test-time-training memory for Moshi, and instruments for long generation.

Plain torch: nothing below this package knows Lightning or TensorBoard.
"""
