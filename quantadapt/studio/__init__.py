"""Pages in the browser: in `demo`, base and tuned model answer side by side; in `studio`, runs are
planned, trained, watched and talked with. They ask no other host for anything."""
