"""What several kinds of tests stand on: waiting with a deadline, a link that can be cut, a whole system of processes."""
