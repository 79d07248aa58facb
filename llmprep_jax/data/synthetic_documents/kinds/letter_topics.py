"""What letters are about: subject, paragraphs with fields, and how each field is asked about."""

import dataclasses
from collections.abc import Callable

from llmprep_jax.data.synthetic_documents import facts, lexicon
from llmprep_jax.data.synthetic_documents.dice import Dice
from llmprep_jax.data.synthetic_documents.facts import Fact
from llmprep_jax.data.synthetic_documents.lexicon import Language, Trio, say

Maker = Callable[[Dice, Language, str], Fact]
Days = tuple[int, int]  # a day so many days after the letter's, at least and at most


@dataclasses.dataclass(frozen=True)
class Topic:
    """A letter.

    Attributes:
      subject, body: templates; paragraphs are parted by blank lines.
      fields: what fills them.
      asks: by field, the ways of asking for it, parted by bars.
    """

    subject: Trio
    body: Trio
    fields: dict[str, Maker | Days]
    asks: dict[str, Trio]


def _invoice(dice: Dice, language: Language, level: str) -> Fact:
    return Fact(facts.code(dice, "INV"))


def _order(dice: Dice, language: Language, level: str) -> Fact:
    return Fact(facts.code(dice, dice.pick(("AX", "KB", "RT", "ZN"))))


def _amount(dice: Dice, language: Language, level: str) -> Fact:
    money = facts.currency(dice, language, level)
    return money.write(money.price(dice.between(20, 900) * 100, dice))


def _salary(dice: Dice, language: Language, level: str) -> Fact:
    money = facts.currency(dice, language, level)
    unit = 10**money.decimals
    return money.write(round(dice.between(2400, 7200) * 100 * money.rate / unit / 50) * 50 * unit)


def _room(dice: Dice, language: Language, level: str) -> Fact:
    return Fact(f"{dice.between(1, 9)}{dice.between(1, 40):02d}")


def _city(dice: Dice, language: Language, level: str) -> Fact:
    return Fact(dice.pick(lexicon.CITIES[language]))


def _person(dice: Dice, language: Language, level: str) -> Fact:
    return Fact(facts.person(dice, language))


def _department(dice: Dice, language: Language, level: str) -> Fact:
    return Fact(say(dice.pick(lexicon.DEPARTMENTS), language))


def _hour(dice: Dice, language: Language, level: str) -> Fact:
    return facts.clock(dice, language, 8, 19)


def _phone(dice: Dice, language: Language, level: str) -> Fact:
    return Fact(facts.phone(dice, language))


def _count(low: int, high: int) -> Maker:
    return lambda dice, language, level: Fact(str(dice.between(low, high)))


INVOICE = Topic(
    ("Invoice {invoice}", "关于账单{invoice}的付款提醒", "關於帳單{invoice}的付款提醒"),
    (
        "Our records show that invoice {invoice} of {amount} has not been paid yet. Please transfer"
        " the amount by {due}.\n\nIf you have paid in the meantime, take no notice of this letter."
        " For questions call {clerk} at {phone}.",
        "经核对，账单{invoice}的款项{amount}至今尚未支付。请您于{due}之前完成转账。\n\n"
        "如果您已经付款，请不必理会此信。如有疑问，请联系{clerk}，电话{phone}。",
        "經核對，帳單{invoice}的款項{amount}至今尚未支付。請您於{due}之前完成轉帳。\n\n"
        "如果您已經付款，請不必理會此信。如有疑問，請聯絡{clerk}，電話{phone}。",
    ),
    {"invoice": _invoice, "amount": _amount, "due": (10, 45), "clerk": _person, "phone": _phone},
    {
        "invoice": (
            "What is the invoice number? | Which invoice is the letter about?",
            "账单号是多少？ | 这封信说的是哪张账单？",
            "帳單號碼是多少？ | 這封信說的是哪張帳單？",
        ),
        "amount": (
            "How much is to be paid? | What is the amount of the invoice?",
            "要付多少钱？ | 账单的金额是多少？",
            "要付多少錢？ | 帳單的金額是多少？",
        ),
        "due": (
            "By when is the amount to be paid? | What is the due date?",
            "最晚哪天付款？ | 付款期限是哪天？",
            "最晚哪天付款？ | 付款期限是哪天？",
        ),
        "clerk": (
            "Whom can one call with questions? | Who answers questions?",
            "有疑问可以联系谁？ | 谁负责解答疑问？",
            "有疑問可以聯絡誰？ | 誰負責解答疑問？",
        ),
        "phone": (
            "Which number is to be called with questions? | What is the number for questions?",
            "有疑问打什么电话？ | 咨询电话是多少？",
            "有疑問打什麼電話？ | 諮詢電話是多少？",
        ),
    },
)
MEETING = Topic(
    ("Invitation to the annual meeting", "年度会议邀请", "年度會議邀請"),
    (
        "We would like to invite you to our annual meeting on {day}. It begins at {hour} in room"
        " {room}, and {speaker} will speak about the coming year.\n\nLunch is served for {guests}"
        " guests. Please let us know by {reply} whether you will come.",
        "我们诚挚邀请您参加{day}举行的年度会议。会议于{hour}在{room}会议室开始，届时{speaker}将"
        "介绍来年的计划。\n\n会后备有{guests}人的午餐。请您在{reply}之前告知是否出席。",
        "我們誠摯邀請您參加{day}舉行的年度會議。會議於{hour}在{room}會議室開始，屆時{speaker}將"
        "介紹來年的計畫。\n\n會後備有{guests}人的午餐。請您在{reply}之前告知是否出席。",
    ),
    {"day": (30, 90), "hour": _hour, "room": _room, "speaker": _person, "guests": _count(12, 96),
     "reply": (7, 25)},
    {
        "day": (
            "On which day is the meeting? | When does the annual meeting take place?",
            "会议在哪天举行？ | 年度会议是哪天？",
            "會議在哪天舉行？ | 年度會議是哪天？",
        ),
        "hour": (
            "At what time does the meeting begin? | When on that day does it start?",
            "会议几点开始？ | 当天几点开会？",
            "會議幾點開始？ | 當天幾點開會？",
        ),
        "room": (
            "In which room is the meeting? | What is the number of the room?",
            "会议在哪个会议室？ | 会议室是几号？",
            "會議在哪個會議室？ | 會議室是幾號？",
        ),
        "speaker": (
            "Who will speak at the meeting? | Who speaks about the coming year?",
            "谁将在会上讲话？ | 谁介绍来年的计划？",
            "誰將在會上講話？ | 誰介紹來年的計畫？",
        ),
        "guests": (
            "For how many guests is lunch served? | How many people is lunch for?",
            "午餐为多少人准备？ | 备了几人的午餐？",
            "午餐為多少人準備？ | 備了幾人的午餐？",
        ),
        "reply": (
            "By when should one reply? | What is the last day to answer?",
            "最晚哪天回复？ | 回复的期限是哪天？",
            "最晚哪天回覆？ | 回覆的期限是哪天？",
        ),
    },
)  # fmt: skip
JOB = Topic(
    ("Your application", "录用通知", "錄取通知"),
    (
        "Thank you for your application. We are glad to offer you a post in {department} at our"
        " office in {city}, beginning on {start}. Your monthly pay will be {salary}, with {days}"
        " days of leave a year.\n\nOn your first day please come to room {room} and ask for"
        " {chief}.",
        "感谢您的申请。我们很高兴地通知您，您已被{department}录用，工作地点在{city}，{start}入职。"
        "您的月薪为{salary}，每年享有{days}天年假。\n\n入职当天请到{room}室找{chief}报到。",
        "感謝您的申請。我們很高興地通知您，您已獲{department}錄取，工作地點在{city}，{start}到職。"
        "您的月薪為{salary}，每年享有{days}天特休。\n\n到職當天請到{room}室找{chief}報到。",
    ),
    {"department": _department, "city": _city, "start": (20, 100), "salary": _salary,
     "days": _count(10, 35), "room": _room, "chief": _person},
    {
        "department": (
            "In which department is the post? | Which department offers the job?",
            "录用的部门是哪个？ | 被哪个部门录用？",
            "錄取的部門是哪個？ | 被哪個部門錄取？",
        ),
        "city": (
            "In which city is the office? | Where is the job?",
            "工作地点在哪个城市？ | 在哪里工作？",
            "工作地點在哪個城市？ | 在哪裡工作？",
        ),
        "start": (
            "On which day does the job begin? | What is the first day of work?",
            "哪天入职？ | 入职日期是哪天？",
            "哪天到職？ | 到職日期是哪天？",
        ),
        "salary": (
            "How much is the monthly pay? | What does the job pay a month?",
            "月薪是多少？ | 每月工资多少？",
            "月薪是多少？ | 每月薪水多少？",
        ),
        "days": (
            "How many days of leave are there? | How long is the yearly leave, in days?",
            "每年有几天年假？ | 年假有多少天？",
            "每年有幾天特休？ | 特休有多少天？",
        ),
        "room": (
            "Which room is to be visited on the first day? | What room should one come to?",
            "入职当天到哪个房间？ | 到几号房间报到？",
            "到職當天到哪個房間？ | 到幾號房間報到？",
        ),
        "chief": (
            "Whom should one ask for on the first day? | Who receives the new colleague?",
            "入职当天找谁报到？ | 向谁报到？",
            "到職當天找誰報到？ | 向誰報到？",
        ),
    },
)  # fmt: skip
PARCEL = Topic(
    ("Delivery of order {order}", "订单{order}的送货通知", "訂單{order}的送貨通知"),
    (
        "Your order {order} left our store in {city} today. It will be delivered on {day} from"
        " {hour} on by {driver}.\n\nThe parcel weighs {weight} kg. If nobody is at home we keep it"
        " for {days} days at our office, {office}.",
        "您的订单{order}今天已从我们的{city}仓库发出，将于{day}{hour}以后由{driver}送达。\n\n"
        "包裹重{weight}公斤。如果家中无人，我们会将包裹在营业点保存{days}天，地址：{office}。",
        "您的訂單{order}今天已從我們的{city}倉庫寄出，將於{day}{hour}以後由{driver}送達。\n\n"
        "包裹重{weight}公斤。如果家中無人，我們會將包裹在營業處保存{days}天，地址：{office}。",
    ),
    {"order": _order, "city": _city, "day": (1, 6), "hour": _hour, "driver": _person,
     "weight": _count(2, 45), "days": _count(3, 21),
     "office": lambda dice, language, level: Fact(facts.address(dice, language))},
    {
        "order": (
            "What is the order number? | Which order is being delivered?",
            "订单号是多少？ | 送的是哪个订单？",
            "訂單號碼是多少？ | 送的是哪個訂單？",
        ),
        "city": (
            "In which city is the store? | Where was the order sent from?",
            "货物从哪里发出？ | 仓库在哪个城市？",
            "貨物從哪裡寄出？ | 倉庫在哪個城市？",
        ),
        "day": (
            "On which day will the order come? | What is the day of delivery?",
            "哪天送达？ | 送货日期是哪天？",
            "哪天送達？ | 送貨日期是哪天？",
        ),
        "hour": (
            "From what time on will it be delivered? | What is the earliest hour of delivery?",
            "几点以后送达？ | 最早几点送到？",
            "幾點以後送達？ | 最早幾點送到？",
        ),
        "driver": (
            "Who delivers the parcel? | Who brings the order?",
            "谁来送货？ | 包裹由谁送达？",
            "誰來送貨？ | 包裹由誰送達？",
        ),
        "weight": (
            "How many kilograms does the parcel weigh? | How heavy is the parcel, in kg?",
            "包裹重多少公斤？ | 包裹有几公斤？",
            "包裹重多少公斤？ | 包裹有幾公斤？",
        ),
        "days": (
            "For how many days is the parcel kept? | How many days does the office keep it?",
            "包裹保存几天？ | 营业点保存多少天？",
            "包裹保存幾天？ | 營業處保存多少天？",
        ),
        "office": (
            "At which address is the parcel kept? | What is the address of the office?",
            "包裹保存在什么地址？ | 营业点的地址是什么？",
            "包裹保存在什麼地址？ | 營業處的地址是什麼？",
        ),
    },
)  # fmt: skip
TOPICS = (INVOICE, MEETING, JOB, PARCEL)
