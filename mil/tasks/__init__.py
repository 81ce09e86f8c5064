"""What a slide classifier is asked, one module per kind of task: targets, loss, metrics."""
