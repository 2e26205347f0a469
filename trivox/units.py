"""What stands beside numbers in a few other languages than English: shares, money, units, times, dates, and short forms
of words. A language is a column of data below; of what it has not, and of all other languages, marks stay as they are.
"""

import re


def marks(units, some):
    """A pattern of those of some marks that there are, the longest first."""
    return "|".join(re.escape(mark) for mark in sorted({*units} & {*some}, key=len, reverse=True))


# {mark: what is said behind 1 / behind others, or in Russian and Polish behind 1 / 2 to 4 / others / decimals}
UNITS = {
    "de": """%: Prozent; ‰: Promille; °C: Grad Celsius; °: Grad; €: Euro; $: Dollar; £: Pfund; CHF: Franken; km:
        Kilometer; m: Meter; cm: Zentimeter; mm: Millimeter; km/h: Kilometer pro Stunde; m^2: Quadratmeter; km^2:
        Quadratkilometer; kg: Kilogramm; g: Gramm; l: Liter; kWh: Kilowattstunde/Kilowattstunden; m^3: Kubikmeter;
        ha: Hektar; t: Tonne/Tonnen; h: Stunde/Stunden; Std.: Stunde/Stunden; min: Minute/Minuten; Mio.:
        Million/Millionen; Mrd.: Milliarde/Milliarden""",
    "fr": """%: pour cent; ‰: pour mille; °C: degré Celsius/degrés Celsius; °: degré/degrés; €: euro/euros; $:
        dollar/dollars; £: livre/livres; km: kilomètre/kilomètres; m: mètre/mètres; cm: centimètre/centimètres; mm:
        millimètre/millimètres; km/h: kilomètre par heure/kilomètres par heure; m^2: mètre carré/mètres carrés; kg:
        kilogramme/kilogrammes; g: gramme/grammes; l: litre/litres; km^2: kilomètre carré/kilomètres carrés; m^3:
        mètre cube/mètres cubes; ha: hectare/hectares; t: tonne/tonnes; min: minute/minutes""",
    "es": """%: por ciento; °C: grado Celsius/grados Celsius; °: grado/grados; €: euro/euros; $: dólar/dólares; £:
        libra/libras; km: kilómetro/kilómetros; m: metro/metros; cm: centímetro/centímetros; mm:
        milímetro/milímetros; km/h: kilómetro por hora/kilómetros por hora; m^2: metro cuadrado/metros cuadrados;
        kg: kilo/kilos; g: gramo/gramos; l: litro/litros; km^2: kilómetro cuadrado/kilómetros cuadrados; m^3: metro
        cúbico/metros cúbicos; ha: hectárea/hectáreas; t: tonelada/toneladas; min: minuto/minutos""",
    "it": """%: per cento; °C: grado Celsius/gradi Celsius; °: grado/gradi; €: euro; $: dollaro/dollari; £:
        sterlina/sterline; km: chilometro/chilometri; m: metro/metri; cm: centimetro/centimetri; mm:
        millimetro/millimetri; km/h: chilometro all'ora/chilometri all'ora; m^2: metro quadrato/metri quadrati; kg:
        chilo/chili; g: grammo/grammi; l: litro/litri; km^2: chilometro quadrato/chilometri quadrati; m^3: metro
        cubo/metri cubi; ha: ettaro/ettari; t: tonnellata/tonnellate; min: minuto/minuti; h: ora/ore; mln:
        milione/milioni; mld: miliardo/miliardi""",
    "pt": """%: por cento; °C: grau Celsius/graus Celsius; °: grau/graus; €: euro/euros; $: dólar/dólares; £:
        libra/libras; R$: real/reais; km: quilômetro/quilômetros; m: metro/metros; cm: centímetro/centímetros; mm:
        milímetro/milímetros; km/h: quilômetro por hora/quilômetros por hora; m^2: metro quadrado/metros quadrados;
        kg: quilo/quilos; g: grama/gramas; l: litro/litros; km^2: quilômetro quadrado/quilômetros quadrados; m^3:
        metro cúbico/metros cúbicos; ha: hectare/hectares; t: tonelada/toneladas; min: minuto/minutos""",
    "nl": """%: procent; ‰: promille; °C: graad Celsius/graden Celsius; °: graad/graden; €: euro; $: dollar; £:
        pond; km: kilometer; m: meter; cm: centimeter; mm: millimeter; km/h: kilometer per uur; km/u: kilometer per
        uur; m^2: vierkante meter; kg: kilo; g: gram; l: liter; km^2: vierkante kilometer; m^3: kubieke meter; ha:
        hectare; t: ton; min: minuut/minuten; mln: miljoen; mld: miljard""",
    "ru": """%: процент/процента/процентов; °C: градус Цельсия/градуса Цельсия/градусов Цельсия; °:
        градус/градуса/градусов; €: евро; $: доллар/доллара/долларов; £: фунт/фунта/фунтов; ₽: рубль/рубля/рублей;
        км: километр/километра/километров; м: метр/метра/метров; см: сантиметр/сантиметра/сантиметров; мм:
        миллиметр/миллиметра/миллиметров; км/ч: километр в час/километра в час/километров в час; кг:
        килограмм/килограмма/килограммов; г: грамм/грамма/граммов; л: литр/литра/литров; руб.: рубль/рубля/рублей;
        м^2: квадратный метр/квадратных метра/квадратных метров; т: тонна/тонны/тонн; ч: час/часа/часов; мин:
        минута/минуты/минут; тыс.: тысяча/тысячи/тысяч; млн: миллион/миллиона/миллионов; млрд:
        миллиард/миллиарда/миллиардов""",
    "pl": """%: procent; °C: stopień Celsjusza/stopnie Celsjusza/stopni Celsjusza/stopnia Celsjusza; °:
        stopień/stopnie/stopni/stopnia; €: euro; $: dolar/dolary/dolarów/dolara; £: funt/funty/funtów/funta; zł:
        złoty/złote/złotych/złotego; km: kilometr/kilometry/kilometrów/kilometra; m: metr/metry/metrów/metra; cm:
        centymetr/centymetry/centymetrów/centymetra; mm: milimetr/milimetry/milimetrów/milimetra; km/h: kilometr na
        godzinę/kilometry na godzinę/kilometrów na godzinę/kilometra na godzinę; m^2: metr kwadratowy/metry
        kwadratowe/metrów kwadratowych/metra kwadratowego; kg: kilogram/kilogramy/kilogramów/kilograma; g:
        gram/gramy/gramów/grama; l: litr/litry/litrów/litra; ha: hektar/hektary/hektarów/hektara; t:
        tona/tony/ton/tony; min: minuta/minuty/minut/minuty; godz.: godzina/godziny/godzin/godziny; tys.:
        tysiąc/tysiące/tysięcy/tysiąca; mln: milion/miliony/milionów/miliona; mld:
        miliard/miliardy/miliardów/miliarda""",
}
UNITS = {language: {mark.strip(): said.strip().split("/") for mark, said in (
    " ".join(row.split()).split(": ") for row in rows.split(";"))} for language, rows in UNITS.items()}
for _units in UNITS.values():
    _units |= {"EUR": _units["€"], "USD": _units["$"]}
ONE = {"de": ("ein", "eine"), "fr": ("un", "une"), "es": ("un", "una"), "it": ("un", "una"), "pt": ("um", "uma"),
       "nl": ("één", "één"), "ru": ("один", "одна"),
       "pl": ("jeden", "jedna")}  # before a unit, of either gender
FEMININE = {"de": "kWh t h Std. min Mio. Mrd.", "fr": "£ t min", "es": "£ ha t", "it": "£ t h", "pt": "£ t",
            "ru": "т мин тыс.", "pl": "t min godz."}
INFLECTED = {"fr": [("un$", "une")], "es": [("veintiún$", "veintiuna"), ("ientos", "ientas")],
             "pt": [("dois$", "duas"), ("entos", "entas")], "ru": [("один$", "одна"), ("два$", "две")],
             "pl": [("dwa$", "dwie")]}  # before a feminine unit
# Words that begin a German sentence and are no nouns
STARTERS = """Dann Da Danach Darauf Er Sie Es Wir Ich Ihr Du Das Die Der Ein Eine Aber Und Nun So In Am Im An Auf Mit
Nach Bei Von Zu Als Wenn Weil Doch Jetzt Heute Hier Dort Man Was Wer Wie Wo Warum Alle Viele""".split()
# Before these a German ordinal ends in n
WEAK = re.compile(r"\b(?:[dD]e[mns]|[aAiI]m|[vV]om|[zZ]u[mr]|[bB]eim|[sS]eit|[aA]b|[bB]is|[nN]ach"
                  r"|(?:[mdskMDSK]?[eE]in|[iI]hr|[uU]nser|[eE]ur)e[mnrs]"
                  r"|(?:[iI]n|[aA]uf|[aA]n|[mM]it|[aA]us|[bB]ei|[nN]ach|[vV]on|[zZ]u|[vV]or) der)(?: \w+ten)? $")
# Before feminine nouns, and what a number that ends in one becomes there
NOUNS = {"de": "Million|Person|Frau|Schwester|Mutter|Tochter|Stadt|Nacht|Hand|Bank|Wand|Zahl|Fahrt|Art|Kraft"
               "|[A-ZÄÖÜ]\\w*(?:[^n]e|ung|heit|keit|schaft|tät|ion|ik|in)", "pl":
         "(?:minut|godzin|sekund|osob|kobiet)[aey]", "ru": "(?:минут|секунд|тонн|страниц|книг)[аыи]|недел[яи]",
         "es": "horas?|semanas?|vez|veces|personas?|páginas?", "it": "ora|volta|settimana|persona|pagina", "fr":
         "heures?|minutes?|semaines?|personnes?|pages?", "pt": "horas?|vez(?:es)?|semanas?|pessoas?|páginas?"}
MASCULINE = {"de": "[A-ZÄÖÜ]\\w+", "es":
             "años?|días?|mes|minutos?|euros?|metros?|kilómetros?|hombres?|niños?|libros?", "it":
             "anno|giorno|mese|minuto|secondo|euro|metro|chilometro|uomo|libro|milione|miliardo"}
# What makes money large, and what stands between
LARGE = {"de": "Million(?:en)?|Milliarden?", "fr": "millions?|milliards?", "es": "mill(?:ón|ones)",
         "it": "milion[ei]|miliard[oi]", "pt": "[mb]ilh(?:ão|ões)", "nl": "miljoen|miljard",
         "ru": "(?:миллион|миллиард)(?:а|ов)?|тысяч[аи]?", "pl": "(?:milion|miliard)(?:y|ów|a)?|tysi[ąę]c[ey]?"}
OF = {"fr": " de", "es": " de", "it": " di", "pt": " de"}
MONEY = {"€": "EUR", "$": "USD", "£": "GBP", "₽": "RUB", "R$": "BRL", "CHF": "CHF", "zł": "PLN", "EUR": "EUR",
         "USD": "USD"}
CENTS = {"de": "Cent/Cent", "fr": "centime/centimes", "es": "céntimo/céntimos", "it": "centesimo/centesimi", "pt":
         "cêntimo/cêntimos", "nl": "cent/cent", "ru": "цент/цента/центов",
         "pl": "cent/centy/centów"}  # of less than 1 €
BETWEEN = {"de": " ", "fr": " ", "es": " con ", "it": " e ", "pt": " e ", "nl": " ",
           "pl": " "}  # whole money and its hundredths
SIGNS = {"de": "und/plus/gleich", "fr": "et/plus/égale", "es": "y/más/igual", "it": "e/più/uguale",
         "pt": "e/mais/igual", "nl": "en/plus/is", "ru": "и/плюс/равно", "pl": "i/plus/równa się"}  # of & + =
SECTION = {"de": "Paragraf", "fr": "paragraphe", "it": "paragrafo", "pt": "parágrafo", "nl": "paragraaf",
           "ru": "параграф", "pl": "paragraf"}  # of § before a number
FRACTIONS = {language: dict(zip("1/2 1/3 2/3 1/4 3/4".split(), words.split(", "))) for language, words in {
    "de": "ein halb, ein Drittel, zwei Drittel, ein Viertel, drei Viertel",
    "fr": "un demi, un tiers, deux tiers, un quart, trois quarts",
    "es": "un medio, un tercio, dos tercios, un cuarto, tres cuartos",
    "it": "un mezzo, un terzo, due terzi, un quarto, tre quarti",
    "pt": "um meio, um terço, dois terços, um quarto, três quartos",
    "nl": "een half, een derde, twee derde, een kwart, drie kwart",
    "ru": "одна вторая, одна третья, две трети, одна четвёртая, три четверти",
    "pl": "jedna druga, jedna trzecia, dwie trzecie, jedna czwarta, trzy czwarte"}.items()}
HOURS = {"de": ("{h} Uhr", "{h} Uhr {m}"), "fr": ("{h} heures", "{h} heures {m}"), "es": ("{h} horas", "{h} y {m}"),
         "it": ("{h}", "{h} e {m}"), "pt": ("{h} horas", "{h} e {m}"), "nl": ("{h} uur", "{h} uur {m}"),
         "ru": ("{h} ноль ноль", "{h} {m}"), "pl": ("{h}", "{h} {m}")}
RATIO = {"de": "zu", "fr": "à", "es": "a", "it": "a", "pt": "a"}  # of 2:1
UPTO = {"de": "bis", "nl": "tot", "fr": "à", "es": "a", "pt": "a"}
MONTHS = {language: months.split() for language, months in {
    "de": "Januar Februar März April Mai Juni Juli August September Oktober November Dezember",
    "fr": "janvier février mars avril mai juin juillet août septembre octobre novembre décembre",
    "es": "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre",
    "it": "gennaio febbraio marzo aprile maggio giugno luglio agosto settembre ottobre novembre dicembre",
    "pt": "janeiro fevereiro março abril maio junho julho agosto setembro outubro novembro dezembro",
    "nl": "januari februari maart april mei juni juli augustus september oktober november december",
    "ru": "января февраля марта апреля мая июня июля августа сентября октября ноября декабря",
    "pl": "stycznia lutego marca kwietnia maja czerwca lipca sierpnia września października listopada grudnia",
}.items()}
# Before a number of four digits, which is then a year, in languages that read it by hundreds
YEARLY = {"de": r"Jahr\w*|[Ss]eit|[Ss]ommer|[Ww]inter|Herbst|Frühjahr|Frühling", "nl": "jaar|[Ss]inds|zomer|winter"}
SHORT = {  # short forms of words, which lose their stop; those that may end a sentence keep it there
    "de": {"z. ?B.": "zum Beispiel", "d. ?h.": "das heißt", "u. ?a.": "unter anderem", "usw.": "und so weiter",
           "etc.": "et cetera", "v. ?Chr.": "vor Christus", "n. ?Chr.": "nach Christus", "Nrn.": "Nummern",
           "bzw.": "beziehungsweise", "ca.": "circa", "Dr.": "Doktor", "Prof.": "Professor", "Nr.": "Nummer",
           "Hr.": "Herr", "Hrn.": "Herrn", "St.": "Sankt", "evtl.": "eventuell", "inkl.": "inklusive",
           "Jh.": "Jahrhundert", "Bd.": "Band", "Abb.": "Abbildung", "Kap.": "Kapitel", "Str.": "Straße",
           "ggf.": "gegebenenfalls", "vgl.": "vergleiche", "Tel.": "Telefon", "s. ?o.": "siehe oben",
           "s. ?u.": "siehe unten", "S.(?= \\d)": "Seite"},
    "fr": {"Mme": "Madame", "Mlle": "Mademoiselle", "(?<![A-Z]. )M.(?= [A-ZÉ])": "Monsieur",
           "MM.(?= [A-Z])": "Messieurs", "Dr": "Docteur", "p. ?ex.": "par exemple", "etc.": "et cetera"},
    "es": {"Sr.": "señor", "Sra.": "señora", "Srta.": "señorita", "Dr.": "doctor", "Dra.": "doctora",
           "p. ?ej.": "por ejemplo", "etc.": "etcétera", "EE. ?UU.": "Estados Unidos"},
    "it": {"Sig.": "signor", "Sig.ra": "signora", "Dott.ssa": "dottoressa", "Dott.": "dottor",
           "Prof.": "professor", "ecc.": "eccetera"},
    "pt": {"Sr.": "senhor", "Sra.": "senhora", "Dr.": "doutor", "Dra.": "doutora", "p. ?ex.": "por exemplo",
           "etc.": "et cetera"},
    "nl": {"dhr.": "de heer", "mevr.": "mevrouw", "bijv.": "bijvoorbeeld", "enz.": "enzovoort",
           "d.w.z.": "dat wil zeggen", "o.a.": "onder andere", "ca.": "circa", "nr.": "nummer"},
    "ru": {"т. ?е.": "то есть", "и т. ?д.": "и так далее", "и т. ?п.": "и тому подобное", "т. ?к.": "так как",
           "напр.": "например", "др.": "другие", "г-н": "господин", "г-жа": "госпожа"},
    "pl": {"np.": "na przykład", "tzn.": "to znaczy", "tj.": "to jest", "m. ?in.": "między innymi", "itd.":
           "i tak dalej", "itp.": "i tym podobne", "wg": "według"},
}



def short_forms(rows):
    """[(pattern, word)] of {short: word}, the longest first; those in small letters may also begin a sentence."""
    both = rows | {short[0].upper() + short[1:]: word[0].upper() + word[1:]
                   for short, word in rows.items() if short[0].islower()}
    return [(re.compile(rf"(?<![\w.]){short.replace('.', '[.]')}(?!\w)"), word)
            for short, word in sorted(both.items(), key=lambda row: -len(row[0]))]


SHORT = {language: short_forms(rows) for language, rows in SHORT.items()}
# Which may end a sentence that another one follows
ENDING = {"und so weiter", "vor Christus", "nach Christus", "et cetera", "etcétera", "eccetera", "enzovoort",
          "и так далее", "и тому подобное", "другие", "i tak dalej", "i tym podobne"}
NUMBER = r"-?\d++(?:[.,]\d++)*+"
AMOUNT = {language: (
    re.compile(rf"(?<![\w.,-])({marks(units, MONEY)}) ?({NUMBER})(?:[.,]--?)?(?![\w%])"),
    re.compile(rf"(?:(?<![\w.,-])|(?<=\d-))({NUMBER})(?:[.,]--?)? ?({marks(units, units)})(?![\w/²³^])"))
    for language, units in UNITS.items()}
TIME = re.compile(r"(?<![\d:.,])([01]?\d|2[0-4]):([0-5]\d)(?: ?(?:Uhr|uur|h|ч)\b)?(?![\d:])"
                  r"|(?<![\d:.,])([01]?\d|2[0-4])\.([0-5]\d) (?:Uhr|uur)\b"
                  r"|(?<![\d:.,])([01]?\d|2[0-4]) ?h ?([0-5]\d)\b|\b([01]?\d|2[0-4]) ?h\b")
DATE = re.compile(r"(?<![\d./-])(0?[1-9]|[12]\d|3[01])([./-])(0?[1-9]|1[0-2])\2((?:1\d|20)\d\d)(?![\d/-]|\.\d)")
CLOCKS = re.compile(r"(?<![\d:.,-])(\d{1,2}:\d\d)-(?=\d{1,2}:\d\d(?![\d:-]))")  # 9:00-17:00
MEASURED = {language: re.compile(rf"(?<![\w.,/-])(\d{{1,4}}(?:[.,]\d{{1,2}})?)-(\d{{1,4}}(?:[.,]\d{{1,2}})?)"
                                 rf"(?= ?(?:{marks(units, units)})(?![\w/]))") for language, units in UNITS.items()}
SCORE = re.compile(r"(?<![\w:.,-])(\d{1,2}):(?=\d(?![\w:]|[.,]\d))")
ISO = re.compile(r"(?<![\w-])((?:1\d|20)\d\d)-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])(?![\w-])")
# am 3.10. war, 01.05.
DAY = re.compile(r"(?<![\w.,-])(?:(?:(?<=\b[aA]m )|(?<=\b[vV]om )|(?<=\b[zZ]um )|(?<=\b[dD]e[mnr] )|(?<=\b[aA]b )"
                 r"|(?<=\b[bB]is )|(?<=\b[sS]eit ))(0?[1-9]|[12]\d|3[01])\.(0?[1-9]|1[0-2])"
                 r"|(0[1-9]|[12]\d|3[01])\.(0[1-9]|1[0-2]))\.(?!\w|\.\d)")
SECONDS = re.compile(r"(?<![\d:])(\d{1,2}):([0-5]\d):([0-5]\d)(?![\d:])")
OCLOCK = re.compile(r"(?:(?<=\b[oO]re )|(?<=\b[aA]lle ))([01]?\d|2[0-4])\.([0-5]\d)(?![\w:]|[.,]\d)")  # alle 14.30
# Those that are read digit by digit
PHONE = re.compile(r"(?<![\w.,+/-])(?:\+[1-9]\d{0,2}|0\d{1,5})(?:[ /-]\d{2,8}){1,4}(?![\w/-]|[.,]\d)")
SPELT = set("de nl es it pt".split())
# A year by itself: no noun follows, which it would count
BARE = re.compile(r"(?<![\w.,:/-])(1[1-9]\d\d)(?!\w|[.,:/]\d|-\w| ?[%€$£°§^]| [A-ZÄÖÜ]| Uhr)")
FRACTION = re.compile(r"(?<![\w.,/-])(?:1/[234]|2/3|3/4)(?![\w/-]|[.,]\d)")
DECADE = re.compile(r"(?<![\w.,/-])([1-9]\d{0,3})(er|fach|mal)(?!\w)"
                    r"|(?<![\w.,/-])([1-9]\d{0,2})-(?=(?:jähr|tägig|stündig)\w)")
GRAMS = re.compile(r"(?<![\w.,-])([12]\d{3}) ?г(?:\.(?!\w)|(?![\w.]))")  # of which Russian years are none
RUSSIAN = {"й": dict(case="n", gender="m"), "го": dict(case="g", gender="m"), "му": dict(case="d", gender="m"),
           "м": dict(case="p", gender="m"), "я": dict(case="n", gender="f"), "ю": dict(case="a", gender="f"),
           "е": dict(case="n", gender="n")}  # the endings of ordinals
ENDED = re.compile(r"(?<![\w.,-])(\d{1,4})-(й|го|му|м|я|ю|е)(?!\w)|(?<![\w.,-])(\d{0,3}0)-х(?= год)")
POLISH = re.compile(rf"(?<![\w.,-])(?:([12]?\d|3[01])(?= (?:{'|'.join(MONTHS['pl'])})\b)"
                    r"|([12]\d{3}) (r\.(?!\w)|roku?(?!\w)))")
RANGE = re.compile(r"(?<![\w.,/-])(\d{1,4})-(\d{1,4})(?![\w/:-]|[.,]\d)")
ORDINAL = {"fr": re.compile(r"(?<![\w.,])(\d{1,3})(er|ère|re|ème|e|nde?)(?!\w)"),
           "nl": re.compile(r"(?<![\w.,])(\d{1,3})(s?t?e|de)(?!\w)"),
           **dict.fromkeys(("es", "it", "pt"), re.compile(
               r"(?<![\w.,])(\d{1,3})\.?([oa]|(?<=[13])er|(?<=[13]\.)er)(?!\w)"))}


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
        text = short.sub(lambda match, word=word: word + ("." if ends(match, word) else ""), text)
    if language not in UNITS:
        return text
    for sign, word in zip("&+=", SIGNS[language].split("/")):
        stands = "(?<= )&(?= )" if sign == "&" else rf"(?<=[\w%€$)]) ?{re.escape(sign)} ?(?=[\w(])"
        text = re.sub(stands, word if sign == "&" else f" {word} ", text)
    if language in SECTION:
        text = re.sub(r"(?<![\w§])§ ?(?=\d)", f"{SECTION[language]} ", text)
    if language in UPTO:
        text = CLOCKS.sub(rf"\1 {UPTO[language]} ", text)
        text = MEASURED[language].sub(lambda match: upto(match, language), text)
    if language == "ru":
        text = ENDED.sub(lambda match: say_ended(match, say), GRAMS.sub(say_year_mark, text))
    if language in SPELT:
        text = PHONE.sub(lambda match: say_phone(match, say), text)
    text = SECONDS.sub(r"\1 \2 \3", ISO.sub(r"\3.\2.\1", text))
    if language == "de":
        text = re.sub(r"(?<=[a-zäöüß])str\.(?!\w)", "straße", text)
        text = DAY.sub(say_day, text)
    if language == "it":
        text = OCLOCK.sub(r"\1:\2", text)
    if language in RATIO:
        text = SCORE.sub(rf"\1 {RATIO[language]} ", text)
    text = DATE.sub(lambda match: say_date(match, language, say), text)
    text = TIME.sub(lambda match: say_time(match, language, say), text)
    if language == "pl":
        text = POLISH.sub(lambda match: say_polish(match, say), text)
    text = FRACTION.sub(lambda match: FRACTIONS[language][match[0]], text)
    money, ruble = marks(UNITS[language], MONEY), "|руб[.]" * (language == "ru")
    text = re.sub(rf"(?<![\w.,-])({money}) ?({NUMBER}) ({LARGE[language]})(?!\w)",
                  lambda match: f"{match[2]} {match[3]} {match[1]}", text)
    before, behind = AMOUNT[language]
    text = before.sub(lambda match: say_amount(match, match[2], match[1], language, say), text)
    text = behind.sub(lambda match: say_amount(match, match[1], match[2], language, say), text)
    text = re.sub(rf"(?<!\w)({LARGE[language]}) ?({money}{ruble})(?!\w)",
                  lambda match: say_large(match, language), text)
    if language in NOUNS:
        text = re.sub(rf"(?<![\w.,/:-])([1-9]\d{{0,8}}) (?=(?:{NOUNS[language]})(?!\w))",
                      lambda match: f"{inflected(say(match[1]) or match[1], language, True)} ", text)
    if language in MASCULINE:
        text = re.sub(rf"(?<![\w.,/:-])([1-9]\d{{0,8}}) (?=(?:{MASCULINE[language]})(?!\w))",
                      lambda match: f"{inflected(say(match[1]) or match[1], language, False)} ", text)
    if language == "de":
        text = DECADE.sub(lambda match: say_compound(match, say), text)
    if language in YEARLY:
        yearly = rf"(\b(?:{YEARLY[language]}|{'|'.join(MONTHS[language])}) )(1[1-9]\d\d)(?![\d.,/-]\d|\w)"
        text = re.sub(yearly, lambda match: match[1] + (say(match[2], "year") or match[2]), text)
    if language == "de":
        text = BARE.sub(lambda match: say(match[1], "year") or match[1], text)
    if language in UPTO:
        text = RANGE.sub(lambda match: say_range(match, language, say), text)
    if language in ORDINAL:
        text = ORDINAL[language].sub(lambda match: say_ordinal(match, language, say), text)
    return text


def ends(match, word):
    """Whether a short form that has a stop ends its text, or a sentence before another."""
    rest = match.string[match.end():].lstrip("\"')")
    return match[0].endswith(".") and (not rest.strip() or word in ENDING and rest[:1] == " " and rest[1:2].isupper())


def say_day(match):
    """24.12.: the day, which `foreign.py` reads, and the month. Its last stop may end a sentence too."""
    day, month = match[1] or match[3], match[2] or match[4]
    rest = match.string[match.end():].lstrip("\"')")
    stop = not rest.strip() or re.match(rf" (?:{'|'.join(STARTERS)})\b", rest)
    return f"{int(day)}. {MONTHS['de'][int(month) - 1]}" + "." * bool(stop)


def say_phone(match, say):
    """A telephone's number, digit by digit, if it has as many as those have."""
    digits = re.sub(r"\D", "", match[0])
    if not 8 <= len(digits) <= 15:
        return match[0]
    return "plus " * match[0].startswith("+") + " ".join(say(digit) or digit for digit in digits)


def upto(match, language):
    """3-5 °C: the first of two numbers and what stands between; what falls is no range."""
    low, high = (float(plain(part)) for part in match.groups())
    return f"{match[1]} {UPTO[language]} {match[2]}" if low < high else match[0]


def inflected(words, language, feminine):
    """A number before a noun or a unit."""
    one = ONE[language][feminine]
    whole = "^" if language in ("it", "pl") else r"\b"
    words = re.sub(rf"{whole}(?:eins|uno|un|um|één|один|jeden)$", one, re.sub("veintiuno$", "veintiún", words))
    for pattern, word in INFLECTED.get(language, ()) if feminine else ():
        words = re.sub(pattern, word, words)
    return words


def say_large(match, language):
    """5 Millionen €: the money behind a large number."""
    forms = UNITS[language][match[2]]
    stop = "." * (match[2].endswith(".") and not match.string[match.end():].strip())
    form = f"{OF.get(language, '')} {forms[2 if len(forms) > 2 else -1]}"
    return match[1] + (form.replace(" de e", " d'e") if language == "fr" else form) + stop


def say_year_mark(match):
    """в 1987 г.: году, where what stands before says so; other years keep their mark."""
    before = match.string[max(0, match.start() - 9):match.start()].lower()
    word = "году" if re.search(r"\b(?:во?|к|по) $", before) else "года" if re.search(
        rf"(?:\b(?:со?|до|от|после)|{'|'.join(month[-6:] for month in MONTHS['ru'])}) $", before) else None
    rest = match.string[match.end():]
    stop = "." * (match[0].endswith(".") and (not rest or rest[1:2].isupper()))
    return f"{match[1]} {word}{stop}" if word else match[0]


def say_ended(match, say):
    """3-й, 5-го, 90-х годов."""
    if match[3]:
        return say(match[3], "ordinal", case="g", plural=True) or match[0]
    following = re.match(r" ([а-яё]+)", match.string[match.end():match.end() + 40])
    how = RUSSIAN[match[2]]
    if match[2] == "й" and following and following[1][-1] in "еыи":  # в 3-й школе
        how = dict(case="g", gender="f")
    if match[2] == "е" and match[1][-1] == "0" and following and following[1].startswith("год"):
        how = dict(case="n", plural=True)
    return say(match[1], "ordinal", **how) or match[0]


def say_polish(match, say):
    """3 października, w 1987 roku: ordinals, in the case that what stands beside asks for."""
    day, year, word = match.groups()
    before = match.string[max(0, match.start() - 3):match.start()].lower()
    ending = "m" if year and re.search(r"\b(?:w|po|o) $", before) else "" if word == "rok" else "ego"
    if not (words := say(day or year, "ordinal")):
        return match[0]
    words = adjective(words, ending)
    if not year:
        return words
    rest = match.string[match.end():]
    stop = "." * (word == "r." and (not rest or rest[1:2].isupper()))
    return f"{words} {word if word == 'rok' else 'roku'}{stop}"


def adjective(words, ending):
    """Polish ordinals with another ending than y or i."""
    if ending == "m" or not ending:
        return re.sub(r"(?<=[yi])\b(?<!trzy\b)", ending, words)
    return re.sub(r"y\b(?<!trzy)", ending, re.sub(r"i\b", "i" * (ending == "ego") + ending, words))


def say_compound(match, say):
    """die 80er, 3fach, 5-jährig."""
    number = match[1] or match[3]
    words = say(number, "year" if len(number) == 4 and number[0] == "1" else "cardinal")
    return (re.sub("^eins$", "ein", words) + (match[2] or "")) if words else match[0]


def say_amount(match, number, mark, language, say):
    """A number before its unit, or money, with its hundredths."""
    units, value = UNITS[language], plain(number.removeprefix("-"))
    after = match.string[match.end():match.end() + 1]
    if not re.fullmatch(r"(?:0|[1-9]\d{0,14})(?:\.\d{1,15})?", value) or mark == "г" and (
            after == "." or re.fullmatch(r"[12]\d{3}", value)):
        return match[0]
    whole, _, decimals = value.partition(".")
    small = mark in MONEY and len(decimals) == 2
    if small and whole == "0" and int(decimals) and mark == "€" and (cents := say(str(int(decimals)))):
        forms, n = CENTS[language].split("/"), int(decimals)
        few = len(forms) > 2 and n % 10 in (2, 3, 4) and n % 100 not in (12, 13, 14)
        form = forms[0 if n == 1 or language == "ru" and n % 10 == 1 and n != 11 else 1 if few else -1]
        return f"{say('-1')[:-len(say('1'))] if number[0] == '-' else ''}{inflected(cents, language, False)} {form}"
    if small and language == "ru":
        return say(value, "currency", currency=MONEY[mark]) or match[0]
    if not (words := say("-" * number.startswith("-") + (whole if small else value))):
        return match[0]
    if (small or not decimals) and (mark not in ("%", "‰") or language in ("de", "ru")):
        words = inflected(words, language, mark in FEMININE.get(language, "").split())
    forms = units[mark]
    if language in ("ru", "pl"):
        n, polish = int(whole), language == "pl"
        one = n == 1 if polish else n % 10 == 1 and n % 100 != 11
        few = n % 10 in (2, 3, 4) and n % 100 not in (12, 13, 14)
        k = (0 if one else 1 if few else 2) if small or not decimals else 3 if polish else 1
        form = forms[min(k, len(forms) - 1)]
    else:
        form = forms[0] if value == "1" or small and whole == "1" else forms[-1]
    if small and int(decimals):
        form += BETWEEN[language] + say(str(int(decimals)))
    stop = mark.endswith(".") and not match.string[match.end():].strip("\"')")
    return f"{words} {form}{'.' * stop}"


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
    elif language == "pl" and hour:
        before = match.string[max(0, match.start() - 4):match.start()].lower()
        h = adjective(say(str(hour), "ordinal"), "ej" if re.search(r"\b(?:o|od|do|po) $", before) else "a")
    if language in ("ru", "pl") and 0 < minute < 10:
        m = f"{say('0')} {m}"
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
    if language == "pl":
        rest = "" if re.match(r" ?r(?:oku|\.)", match.string[match.end():]) else " roku"
        words = adjective(say(day, "ordinal"), "ego"), adjective(say(year, "ordinal"), "ego")
        return f"{words[0]} {month} {words[1]}{rest}"
    before = match.string[max(0, match.start() - 30):match.start()]
    if language == "de":
        ending = "n" if WEAK.search(before) else "" if re.search(r"\b[dD]er $", before) else "r"
        first = (say(day, "ordinal") or "") + ending
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
        if match[2].startswith("nd"):
            return {"nd": "second", "nde": "seconde"}[match[2]] if match[1] == "2" else match[0]
        return "première" if match[1] == "1" and match[2] in ("re", "ère") else words
    if match[2] == "er":
        return {"1": "primer", "3": "tercer"}.get(match[1], match[0]) if language == "es" else match[0]
    return re.sub(r"o\b", "a", words) if match[2] == "a" else words
