"""What is counted: a process's counters, the family's memory, snapshots, and the table of metrics."""
