"""A page of its own about what networks see in images: `look` computes it, `page` writes it.

The page's source are `report.html`, `report.css` and the `.js` files; a written page holds them and the
data, and asks nothing of a network or a server.
"""
