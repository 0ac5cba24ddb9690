"""The kinds of pages, a module each: data in, pages out."""
