// What the theme leaves out for readers with a keyboard or a screen reader; tests/docs/test_pages.py looks for it.
for (const caption of document.querySelectorAll('p.caption[role="heading"]')) caption.ariaLevel = 2;
const label = (selector, text) => document.querySelector(selector)?.setAttribute("aria-label", text);
label("aside.sidebar-drawer", "Pages");
label("aside.toc-drawer", "On this page");
for (const block of document.querySelectorAll("div.highlight pre, div.table-wrapper, p:has(> img)")) block.tabIndex = 0;
