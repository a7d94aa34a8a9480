"""Lightning callbacks: they observe and write, and do no arithmetic."""
