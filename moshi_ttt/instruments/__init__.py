"""What is seen of a generation while it runs, and the records it leaves."""
