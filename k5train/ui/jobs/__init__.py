"""The queue: ordinary ``k5cache`` and ``k5train`` processes, one a GPU, that outlive the page. No web library."""
