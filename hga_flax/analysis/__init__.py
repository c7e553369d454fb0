"""What a network costs, and the paper's tables beside ours."""
