"""What HTTP costs: the server beside the engine in this process, and steps beside clients that disturb."""
