"""What is written: requests, branches, forks, joins, budgets, answers. No page, no tensor."""
