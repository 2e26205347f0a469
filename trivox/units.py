"""What stands beside numbers in a few other languages than English: shares, money, units, times, dates, and short forms
of words. A language is a column of data below; of what it has not, and of all other languages, marks stay as they are.
"""

import re

def marks(units, some):
    """A pattern of those of some marks that there are, the longest first."""
    return "|".join(re.escape(mark) for mark in sorted({*units} & {*some}, key=len, reverse=True))


# {mark: what is said behind 1 / behind others, or in Russian behind 1 / 2 to 4 / others}
UNITS = {
    "de": """%: Prozent; ‰: Promille; °C: Grad Celsius; °: Grad; €: Euro; $: Dollar; £: Pfund; CHF: Franken; km:
        Kilometer; m: Meter; cm: Zentimeter; mm: Millimeter; km/h: Kilometer pro Stunde; m^2: Quadratmeter; km^2:
        Quadratkilometer; kg: Kilogramm; g: Gramm; l: Liter; kWh: Kilowattstunde/Kilowattstunden""",
    "fr": """%: pour cent; ‰: pour mille; °C: degré Celsius/degrés Celsius; °: degré/degrés; €: euro/euros; $:
        dollar/dollars; £: livre/livres; km: kilomètre/kilomètres; m: mètre/mètres; cm: centimètre/centimètres; mm:
        millimètre/millimètres; km/h: kilomètre par heure/kilomètres par heure; m^2: mètre carré/mètres carrés; kg:
        kilogramme/kilogrammes; g: gramme/grammes; l: litre/litres""",
    "es": """%: por ciento; °C: grado Celsius/grados Celsius; °: grado/grados; €: euro/euros; $: dólar/dólares; £:
        libra/libras; km: kilómetro/kilómetros; m: metro/metros; cm: centímetro/centímetros; mm: milímetro/milímetros;
        km/h: kilómetro por hora/kilómetros por hora; m^2: metro cuadrado/metros cuadrados; kg: kilo/kilos; g:
        gramo/gramos; l: litro/litros""",
    "it": """%: per cento; °C: grado Celsius/gradi Celsius; °: grado/gradi; €: euro; $: dollaro/dollari; £:
        sterlina/sterline; km: chilometro/chilometri; m: metro/metri; cm: centimetro/centimetri; mm:
        millimetro/millimetri; km/h: chilometro all'ora/chilometri all'ora; m^2: metro quadrato/metri quadrati; kg:
        chilo/chili; g: grammo/grammi; l: litro/litri""",
    "pt": """%: por cento; °C: grau Celsius/graus Celsius; °: grau/graus; €: euro/euros; $: dólar/dólares; £:
        libra/libras; R$: real/reais; km: quilômetro/quilômetros; m: metro/metros; cm: centímetro/centímetros; mm:
        milímetro/milímetros; km/h: quilômetro por hora/quilômetros por hora; m^2: metro quadrado/metros quadrados; kg:
        quilo/quilos; g: grama/gramas; l: litro/litros""",
    "nl": """%: procent; ‰: promille; °C: graad Celsius/graden Celsius; °: graad/graden; €: euro; $: dollar; £: pond;
        km: kilometer; m: meter; cm: centimeter; mm: millimeter; km/h: kilometer per uur; km/u: kilometer per uur; m^2:
        vierkante meter; kg: kilo; g: gram; l: liter""",
    "ru": """%: процент/процента/процентов; °C: градус Цельсия/градуса Цельсия/градусов Цельсия; °:
        градус/градуса/градусов; €: евро; $: доллар/доллара/долларов; £: фунт/фунта/фунтов; ₽: рубль/рубля/рублей; км:
        километр/километра/километров; м: метр/метра/метров; см: сантиметр/сантиметра/сантиметров; мм:
        миллиметр/миллиметра/миллиметров; км/ч: километр в час/километра в час/километров в час; кг:
        килограмм/килограмма/килограммов; г: грамм/грамма/граммов; л: литр/литра/литров; руб.: рубль/рубля/рублей""",
}
UNITS = {language: {mark.strip(): said.strip().split("/") for mark, said in (
    " ".join(row.split()).split(": ") for row in rows.split(";"))} for language, rows in UNITS.items()}
ONE = {"de": ("ein", "eine"), "fr": ("un", "une"), "es": ("un", "una"), "it": ("un", "una"), "pt": ("um", "uma"),
       "nl": ("één", "één"), "ru": ("один", "одна")}  # before a unit, of either gender
FEMININE = {"£", "kWh"}  # but for Russian
MONEY = {"€": "EUR", "$": "USD", "£": "GBP", "₽": "RUB", "R$": "BRL", "CHF": "CHF"}
BETWEEN = {"de": " ", "fr": " ", "es": " con ", "it": " e ", "pt": " e ", "nl": " "}  # whole money and its hundredths
SIGNS = {"de": "und plus gleich", "fr": "et plus égale", "es": "y más igual", "it": "e più uguale",
         "pt": "e mais igual", "nl": "en plus is", "ru": "и плюс равно"}  # of & + =
HOURS = {"de": ("{h} Uhr", "{h} Uhr {m}"), "fr": ("{h} heures", "{h} heures {m}"), "es": ("{h} horas", "{h} y {m}"),
         "it": ("{h}", "{h} e {m}"), "pt": ("{h} horas", "{h} e {m}"), "nl": ("{h} uur", "{h} uur {m}"),
         "ru": ("{h} ноль ноль", "{h} {m}")}
UPTO = {"de": "bis", "nl": "tot", "fr": "à", "es": "a", "pt": "a"}
MONTHS = {language: months.split() for language, months in {
    "de": "Januar Februar März April Mai Juni Juli August September Oktober November Dezember",
    "fr": "janvier février mars avril mai juin juillet août septembre octobre novembre décembre",
    "es": "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre",
    "it": "gennaio febbraio marzo aprile maggio giugno luglio agosto settembre ottobre novembre dicembre",
    "pt": "janeiro fevereiro março abril maio junho julho agosto setembro outubro novembro dezembro",
    "nl": "januari februari maart april mei juni juli augustus september oktober november december",
    "ru": "января февраля марта апреля мая июня июля августа сентября октября ноября декабря"}.items()}
# Before a number of four digits, which is then a year, in languages that read it by hundreds
YEARLY = {"de": r"Jahr\w*|[Ss]eit|[Ss]ommer|[Ww]inter|Herbst|Frühjahr|Frühling", "nl": "jaar|[Ss]inds|zomer|winter"}
SHORT = {  # short forms of words, which lose their stop; those that may end a sentence keep it there
    "de": {"z. ?B.": "zum Beispiel", "d. ?h.": "das heißt", "u. ?a.": "unter anderem", "usw.": "und so weiter",
           "bzw.": "beziehungsweise", "ca.": "circa", "Dr.": "Doktor", "Prof.": "Professor", "Nr.": "Nummer",
           "Hr.": "Herr", "Hrn.": "Herrn", "St.": "Sankt", "evtl.": "eventuell", "inkl.": "inklusive"},
    "fr": {"Mme": "Madame", "Mlle": "Mademoiselle", "M.(?= [A-Z])": "Monsieur", "MM.(?= [A-Z])": "Messieurs",
           "Dr": "Docteur", "p. ?ex.": "par exemple", "etc.": "et cetera"},
    "es": {"Sr.": "señor", "Sra.": "señora", "Srta.": "señorita", "Dr.": "doctor", "Dra.": "doctora",
           "p. ?ej.": "por ejemplo", "etc.": "etcétera", "EE. ?UU.": "Estados Unidos"},
    "it": {"Sig.": "signor", "Sig.ra": "signora", "Dott.": "dottor", "Prof.": "professor", "ecc.": "eccetera"},
    "pt": {"Sr.": "senhor", "Sra.": "senhora", "Dr.": "doutor", "Dra.": "doutora", "p. ?ex.": "por exemplo",
           "etc.": "et cetera"},
    "nl": {"dhr.": "de heer", "mevr.": "mevrouw", "bijv.": "bijvoorbeeld", "enz.": "enzovoort",
           "d.w.z.": "dat wil zeggen", "o.a.": "onder andere", "ca.": "circa", "nr.": "nummer"},
    "ru": {"т. ?е.": "то есть", "и т. ?д.": "и так далее", "и т. ?п.": "и тому подобное", "т. ?к.": "так как",
           "напр.": "например", "др.": "другие", "тыс.": "тысяч", "г-н": "господин", "г-жа": "госпожа"},
}
SHORT = {language: [(re.compile(rf"(?<![\w.]){short.replace('.', '[.]').replace('[.][.]', '[.]')}(?!\w)"), word)
                    for short, word in sorted(rows.items(), key=lambda row: -len(row[0]))]
         for language, rows in SHORT.items()}
NUMBER = r"-?\d++(?:[.,]\d++)*+"
AMOUNT = {language: (
    re.compile(rf"(?<![\w.,-])({marks(units, MONEY)}) ?({NUMBER})(?:[.,]--?)?(?![\w%])"),
    re.compile(rf"(?<![\w.,-])({NUMBER})(?:[.,]--?)? ?({marks(units, units)})(?![\w/²³])"))
    for language, units in UNITS.items()}
TIME = re.compile(r"(?<![\d:.,])([01]?\d|2[0-4]):([0-5]\d)(?: ?(?:Uhr|uur|h|ч)\b)?(?![\d:])"
                  r"|(?<![\d:.,])([01]?\d|2[0-4])\.([0-5]\d) (?:Uhr|uur)\b"
                  r"|(?<![\d:.,])([01]?\d|2[0-4]) ?h ?([0-5]\d)\b|\b([01]?\d|2[0-4]) ?h\b")
DATE = re.compile(r"(?<![\d./-])(0?[1-9]|[12]\d|3[01])([./-])(0?[1-9]|1[0-2])\2((?:1\d|20)\d\d)(?![\d/-]|\.\d)")
RANGE = re.compile(r"(?<![\w.,/-])(\d{1,4})-(\d{1,4})(?![\w/:-]|[.,]\d)")
ORDINAL = {"fr": re.compile(r"(?<![\w.,])(\d{1,3})(er|ère|re|ème|e|nde?)(?!\w)"),
           "nl": re.compile(r"(?<![\w.,])(\d{1,3})(s?t?e|de)(?!\w)"),
           **dict.fromkeys(("es", "it", "pt"), re.compile(r"(?<![\w.,])(\d{1,3})\.?([oa])(?!\w)"))}


def plain(number):
    """A number, with points or commas before groups of three digits or before decimals, as Python reads it."""
    if re.fullmatch(r"\d{1,3}([.,])\d{3}(\1\d{3})*", number):
        return re.sub("[.,]", "", number)
    if re.fullmatch(r"\d{1,3}(\.\d{3})+,\d+|\d{1,3}(,\d{3})+\.\d+", number):  # 1.234,56
        mark = "," if number.rindex(",") > number.rindex(".") else "."
        return number.replace(".," [mark == "."], "").replace(",", ".")
    return number.replace(",", ".")


def say_units(text, language, say):
    """A text of a language with what stands beside its numbers in words. say(number, form="cardinal", **inflected): the
    words of one as Python writes it, None where there are none."""
    for short, word in SHORT.get(language, ()):
        text = short.sub(lambda match, word=word: word + ("." if ends(match) else ""), text)
    if language not in UNITS:
        return text
    for sign, word in zip("&+=", SIGNS[language].split()):
        stands = "(?<= )&(?= )" if sign == "&" else rf"(?<=[\w%€$)]) ?{re.escape(sign)} ?(?=[\w(])"
        text = re.sub(stands, word if sign == "&" else f" {word} ", text)
    text = DATE.sub(lambda match: say_date(match, language, say), text)
    text = TIME.sub(lambda match: say_time(match, language, say), text)
    before, behind = AMOUNT[language]
    text = before.sub(lambda match: say_amount(match, match[2], match[1], language, say), text)
    text = behind.sub(lambda match: say_amount(match, match[1], match[2], language, say), text)
    if language in YEARLY:
        yearly = rf"(\b(?:{YEARLY[language]}|{'|'.join(MONTHS[language])}) )(1[1-9]\d\d)(?![\d.,/-]\d|\w)"
        text = re.sub(yearly, lambda match: match[1] + (say(match[2], "year") or match[2]), text)
    if language in UPTO:
        text = RANGE.sub(lambda match: say_range(match, language, say), text)
    if language in ORDINAL:
        text = ORDINAL[language].sub(lambda match: say_ordinal(match, language, say), text)
    return text


def ends(match):
    """Whether a short form that has a stop ends its text."""
    return match[0].endswith(".") and not match.string[match.end():].strip("\"')")


def say_amount(match, number, mark, language, say):
    """A number before its unit, or money, with its hundredths."""
    units, value = UNITS[language], plain(number.removeprefix("-"))
    if not re.fullmatch(r"(?:0|[1-9]\d{0,14})(?:\.\d{1,15})?", value):
        return match[0]
    whole, _, decimals = value.partition(".")
    small = mark in MONEY and len(decimals) == 2
    if small and language == "ru":
        return say(value, "currency", currency=MONEY[mark]) or match[0]
    if not (words := say("-" * number.startswith("-") + (whole if small else value))):
        return match[0]
    one = ONE[language][mark in FEMININE and language != "ru"]
    if language in ONE and (small or not decimals):
        words = re.sub(r"\b(?:eins|uno|un|um|één|один)$", one, words)
        words = re.sub("veintiuno$", "veintiún", words)
    forms = units[mark]
    if language == "ru":
        n = int(whole)
        form = forms[0 if n % 10 == 1 and n % 100 != 11 else 1 if n % 10 in (2, 3, 4) and n % 100 not in (12, 13, 14)
                     else 2] if not decimals and len(forms) > 1 else forms[min(1, len(forms) - 1)]
    else:
        form = forms[0] if value == "1" or small and whole == "1" else forms[-1]
    if small and int(decimals):
        form += BETWEEN[language] + say(str(int(decimals)))
    return f"{words} {form}"


def say_time(match, language, say):
    """14:30, 14h30, 8.15 Uhr."""
    hour, minute = [part for part in match.groups() if part][:2] + ["0"] * (match[7] is not None)
    if match[7] or match[5]:
        if language not in ("fr", "pt", "es"):
            return match[0]
    hour, minute = int(hour), int(minute)
    h, m = say(str(hour)), say(str(minute))
    if not h or not m:
        return match[0]
    if language == "de":
        h = re.sub("^eins$", "ein", h)
    elif language in ("fr", "pt", "es"):
        h = re.sub(r"(?:uno|un|um)$", {"fr": "une", "pt": "uma", "es": "una"}[language], h)
        h = re.sub("dois$", "duas", h) if language == "pt" else h
    elif language == "ru" and 0 < minute < 10:
        m = f"ноль {m}"
    text = HOURS[language][minute > 0].format(h=h, m=m)
    return re.sub(r"\b(heure|hora)s", r"\1", text) if hour == 1 else text


def say_date(match, language, say):
    """3.10.2023: the day, the month and the year."""
    day, mark, month, year = match.groups()
    if mark == "-" and language in ("de", "ru"):
        return match[0]
    day, month = str(int(day)), MONTHS[language][int(month) - 1]
    if language == "ru":
        words = say(day, "ordinal", case="g", gender="n"), say(year, "ordinal", case="g", gender="m")
        rest = "" if re.match(r" ?г(?:ода|\.)", match.string[match.end():]) else " года"
        return f"{words[0]} {month} {words[1]}{rest}" if all(words) else match[0]
    before = match.string[max(0, match.start() - 30):match.start()]
    if language == "de":
        weak = re.search(r"\b(?:[dD]e[mns]|[aA]m|[vV]om|[zZ]um|[bB]eim|[sS]eit|[aA]b|[bB]is)(?: zum)? $", before)
        first = (say(day, "ordinal") or "") + ("n" if weak else "" if re.search(r"\b[dD]er $", before) else "r")
    else:
        first = {"fr": "premier", "it": "primo", "pt": "primeiro"}.get(language) if day == "1" else None
        first = first or say(day)
    last, of = say(year, "year" if language in YEARLY else "cardinal"), " de " if language in ("es", "pt") else " "
    return of.join((first, month, last)) if first and last else match[0]


def say_range(match, language, say):
    low, high = match.groups()
    if int(low) >= int(high) or low[0] == "0" or high[0] == "0":
        return match[0]
    form = "year" if language in YEARLY and re.match("1[1-9]..$", low) and len(high) == 4 else "cardinal"
    words = say(low, form), say(high, form if high[0] == "1" else "cardinal")
    return f"{words[0]} {UPTO[language]} {words[1]}" if all(words) else match[0]


def say_ordinal(match, language, say):
    """1er, 2e, 1º, 3de."""
    if not (words := say(match[1], "ordinal")):
        return match[0]
    if language == "fr":
        return "première" if match[1] == "1" and match[2] in ("re", "ère") else words
    return re.sub("o$", "a", words) if match[2] == "a" else words
