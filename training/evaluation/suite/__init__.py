"""Every backbone on every task: the queue of runs, and its tables and plots."""
