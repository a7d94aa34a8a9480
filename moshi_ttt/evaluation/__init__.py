"""One evaluation: let the model talk, judge what came of it, write it down."""
