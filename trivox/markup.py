"""A text without the marks of HTML and Markdown around what they emphasise, and on one line: rules for English."""

import re

FENCE = re.compile(r"^ *(?:```|~~~)[\w-]*\s*$")  # around code
MARKED = re.compile(r"^\s*(#{1,6}|[*>•‣▪]+|[-+])\s+(?=\S)")  # a heading, a quotation, an item of a list
TITLED = re.compile(r"(?:chapter|part|act|scene|book|volume|section|canto|letter) (?:\w+|[IVXLC]+)\s*$", re.IGNORECASE)
STOPPED = re.compile(r"[.!?:;,…。！？؟।—–-][\"'”’)\]*_]*$")  # what ends a line so is no heading
INLINE = {"a", "b", "i", "u", "s", "em", "strong", "span", "small", "code", "sub", "sup", "font", "q", "cite", "mark",
          "abbr", "kbd", "del", "ins", "big", "tt"}
BLOCK = {"p", "br", "hr", "div", "li", "ul", "ol", "dl", "dt", "dd", "td", "th", "tr", "table", "thead", "tbody",
         "blockquote", "pre", "section", "article", "header", "footer", "main", "nav", "img", "html", "body", "head",
         "title", "script", "style", *(f"h{n}" for n in range(1, 7))}
VALUE = r"\s+[A-Za-z-]{1,40}(?:=(?:\"[^\"<>]{0,500}\"|'[^'<>]{0,500}'|[^\s\"'<>]{1,500}))"
HTML = re.compile(rf"<(?:/({'|'.join(sorted(INLINE | BLOCK))})|({'|'.join(sorted(INLINE | BLOCK))})"
                  rf"(?:{VALUE}){{0,20}}\s*/?)>", re.IGNORECASE)
PIECE = r"<{0}(?:\s+class=\"[^\"<>]{{0,99}}\")?>\s*([^<>]{{1,40}}?)\s*</{0}>"
SUP, SUB = (re.compile(PIECE.format(name), re.IGNORECASE) for name in ("sup", "sub"))
RAISED = str.maketrans("0123456789+-−", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻")
LOWERED = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
TAG = re.compile(r"(?<!\w)<(/?[^\W\d][^<>=]{0,99})>(?!\w)")  # <again>, which is none of HTML's


def raised(match):
    """10<sup>6</sup> as 10⁶, 19<sup>th</sup> as 19th; other words apart."""
    piece = match[1]
    if re.fullmatch(r"[+−-]?\d+", piece):
        return piece.translate(RAISED)
    if re.fullmatch("st|nd|rd|th", piece, re.IGNORECASE):
        return piece
    return f"^{piece}" if re.fullmatch("[A-Za-z]", piece) else f" {piece} "


def untagged(text):
    """Without HTML's tags; where a paragraph ends, a line does."""
    text = SUB.sub(lambda match: match[1].translate(LOWERED), SUP.sub(raised, text))
    return HTML.sub(lambda tag: "" if (tag[1] or tag[2]).lower() in INLINE else
                    " " if (tag[1] or tag[2]).lower() in ("td", "th", "img") else "\n\n" if tag[2] != "br" else "\n",
                    text)


def one_line(text):
    """On one line, without Markdown's marks before lines. Where a paragraph, a heading or an item of a list ends
    without a mark, it gets a stop, so that what follows is another sentence."""
    if "\n" not in (text := text.strip()):  # of a line alone, a dash is no item of a list
        return re.sub(r"^[#*>]{1,6}\s+(?=[^\W\d])", "", text)
    lines, before, heading = [], "", False
    for line in text.split("\n"):
        if FENCE.match(line):
            line = ""
        mark = MARKED.match(line)
        if mark:
            line = line[mark.end():]
        line = " ".join(line.split())
        apart = not line or mark and mark[1] != ">"
        if before and (apart or heading) and not STOPPED.search(before) and before[-1:].isprintable():
            lines[-1] += "。" if "\u3040" <= before[-1] <= "\u9fff" else "."
        if line:
            lines.append(line)
        before = line
        heading = bool(mark and mark[1] != ">" or TITLED.fullmatch(line) or line.isupper() and len(line.split()) < 9
                       and re.search("[A-Z]{2}", line))
    return " ".join(lines)
