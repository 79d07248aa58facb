"""The words that documents are made of, in English, simplified and traditional Chinese.

What has a meaning in all three is a row of three (`Trio`); names and places are lists of their own.
Simplified words are in GB 2312 and traditional ones in Big5, so that a font of either has them.
"""

from collections.abc import Sequence
from typing import Literal, get_args

Language = Literal["en", "zh-Hans", "zh-Hant"]
LANGUAGES: tuple[Language, ...] = get_args(Language)
Trio = tuple[str, str, str]  # in the order of LANGUAGES


def say(trio: Sequence[str], language: Language) -> str:
    """The member of a trio in a language."""
    return trio[LANGUAGES.index(language)]


def _lists(*texts: str) -> dict[Language, tuple[str, ...]]:
    """A list a language; items are parted by commas."""
    split = (tuple(item.strip() for item in text.split(",")) for text in texts)
    return dict(zip(LANGUAGES, split, strict=True))


def _rows(text: str) -> list[tuple[str, ...]]:
    """A row a line, parted by bars."""
    return [tuple(part.strip() for part in row.split("|")) for row in text.strip().split("\n")]


def _trios(text: str) -> tuple[Trio, ...]:
    return tuple((en, hans, hant) for en, hans, hant in _rows(text))


GIVEN = _lists(
    "Anna, Ben, Clara, David, Emma, Frank, Grace, Henry, Irene, Jack, Karen, Leo, Maria, Nina,"
    " Oliver, Paul, Ruth, Sam, Tina, Victor, Wendy, Alice, Brian, Diana, Eric, Fiona, George,"
    " Helen, Ian, Julia",
    "小明, 建国, 志强, 丽华, 秀英, 文博, 雨晴, 子轩, 佳怡, 伟, 芳, 静, 美玲, 国栋,"
    " 海燕, 思远, 晓东,"
    " 春梅, 俊杰, 家豪, 淑芬, 欣怡, 明哲, 慧敏, 天佑, 立新, 婷婷, 宏伟",
    "小明, 建國, 志強, 麗華, 秀英, 文博, 雨晴, 子軒, 佳怡, 偉, 芳, 靜, 美玲, 國棟,"
    " 海燕, 思遠, 曉東,"
    " 春梅, 俊傑, 家豪, 淑芬, 欣怡, 明哲, 慧敏, 天佑, 雅婷, 怡君, 宗翰",
)
SURNAMES = _lists(
    "Adams, Baker, Carter, Dixon, Evans, Foster, Graham, Hughes, Irwin, Jones, Knight, Lewis,"
    " Morgan, Nolan, Owens, Parker, Quinn, Reed, Stone, Turner, Walker, Young, Brooks, Cole,"
    " Ellis, Ford, Grant, Hill, Moore, Price",
    "王, 李, 张, 刘, 陈, 杨, 赵, 黄, 周, 吴, 徐, 孙, 马, 朱, 胡, 林, 郭, 何, 高, 罗, 郑,"
    " 梁, 谢, 宋,"
    " 唐, 许, 韩, 冯, 邓, 曹",
    "王, 李, 張, 劉, 陳, 楊, 趙, 黃, 周, 吳, 徐, 孫, 馬, 朱, 胡, 林, 郭, 何, 高, 羅, 鄭,"
    " 梁, 謝, 宋,"
    " 唐, 許, 韓, 馮, 鄧, 曹",
)
CITIES = _lists(
    "London, Bristol, Leeds, York, Dublin, Boston, Chicago, Denver, Seattle, Austin, Toronto,"
    " Sydney, Oxford, Bath, Portland, Dallas, Cardiff, Perth",
    "北京, 上海, 广州, 深圳, 成都, 杭州, 南京, 武汉, 西安, 重庆, 苏州, 天津, 厦门,"
    " 青岛, 昆明, 大连,"
    " 长沙, 济南",
    "台北, 高雄, 台中, 台南, 新竹, 香港, 澳門, 花蓮, 基隆, 嘉義, 桃園, 宜蘭, 台東,"
    " 屏東, 彰化, 苗栗",
)
STREETS = _lists(
    "High Street, Park Lane, Mill Road, Station Road, Church Street, King Street, Bridge Street,"
    " Green Lane, Oak Avenue, Elm Street, River Road, Harbour Way",
    "中山路, 人民路, 解放路, 建设路, 和平路, 长江路, 文化路, 学院路, 新华路,"
    " 东风路, 南京路, 花园路",
    "中山路, 中正路, 民生路, 和平路, 復興路, 忠孝路, 建國路, 文化路, 光復路,"
    " 信義路, 成功路, 公園路",
)
COMPANIES = _lists(
    "Harbor Light Ltd, Maple & Sons, Bright Path Consulting, Stonebridge Insurance, Riverside"
    " Housing, Clearwater Energy, Oakfield School, Summit Logistics, Evergreen Clinic, Parkview"
    " Library, Bluebell Travel, Ironwood Works",
    "晨光贸易有限公司, 远航物流有限公司, 青松诊所, 华美装饰公司,"
    " 新河中学, 蓝天旅行社, 金桥保险公司,"
    " 安居物业公司, 清泉水务公司, 启明图书馆, 丰收农业公司, 白鹭出版社",
    "晨光貿易有限公司, 遠航物流有限公司, 青松診所, 華美裝潢公司,"
    " 新河中學, 藍天旅行社, 金橋保險公司,"
    " 安居物業公司, 清泉水務公司, 啟明圖書館, 豐收農業公司, 白鷺出版社",
)
SHOPS = _lists(
    "Green Market, Corner Shop, Daily Fresh, Sunny Foods, City Grocer, Red Apple Store, Blue Door"
    " Shop, Village Stores, Moonlight Deli, Harvest Pantry",
    "阳光超市, 百家便利店, 绿叶生鲜, 好邻居超市, 天天鲜果, 幸福商店,"
    " 万家食品, 东方百货, 小红帽便利店,"
    " 新星超市",
    "陽光超市, 百家便利商店, 綠葉生鮮, 好鄰居超市, 天天鮮果, 幸福商店, 萬家食品, 東方百貨,"
    " 小紅帽便利商店, 新星超市",
)
RESTAURANTS = _lists(
    "The Golden Spoon, River Cafe, The Old Mill, Blue Lantern, Maple House, Harbour Grill,"
    " The Olive Tree, Corner Bistro, Silver Fork, Garden Kitchen",
    "老街饭馆, 江南小厨, 四季酒家, 聚福楼, 竹园餐厅, 明月茶餐厅, 荷花酒楼,"
    " 家味小馆, 金龙饭店, 山水人家",
    "老街飯館, 江南小廚, 四季酒家, 聚福樓, 竹園餐廳, 明月茶餐廳, 荷花酒樓,"
    " 家味小館, 金龍飯店, 山水人家",
)
DEPARTMENTS = _trios("""
Sales | 销售部 | 業務部
Finance | 财务部 | 財務部
Personnel | 人事部 | 人事部
Purchasing | 采购部 | 採購部
Design | 设计部 | 設計部
Support | 客服部 | 客服部
Legal | 法务部 | 法務部
Research | 研发部 | 研發部
""")
SUBJECTS = _trios("""
Maths | 数学 | 數學
English | 英语 | 英語
Science | 科学 | 自然
History | 历史 | 歷史
Music | 音乐 | 音樂
Art | 美术 | 美術
""")
MONTHS = tuple(
    (name, f"{number}月", f"{number}月")
    for number, name in enumerate(
        (
            "January",
            "February",
            "March",
            "April",
            "May",
            "June",
            "July",
            "August",
            "September",
            "October",
            "November",
            "December",
        ),
        1,
    )
)
WEEKDAYS = _trios("""
Monday | 周一 | 週一
Tuesday | 周二 | 週二
Wednesday | 周三 | 週三
Thursday | 周四 | 週四
Friday | 周五 | 週五
Saturday | 周六 | 週六
Sunday | 周日 | 週日
""")
# what a shop sells, with its price in US cents
_GOODS = """
apples | 苹果 | 蘋果 | 240
milk | 牛奶 | 牛奶 | 180
bread | 面包 | 麵包 | 250
eggs | 鸡蛋 | 雞蛋 | 320
rice | 大米 | 白米 | 450
green tea | 绿茶 | 綠茶 | 380
coffee | 咖啡 | 咖啡 | 620
orange juice | 橙汁 | 柳橙汁 | 330
butter | 黄油 | 奶油 | 290
cheese | 奶酪 | 起司 | 480
chicken | 鸡肉 | 雞肉 | 750
salmon | 三文鱼 | 鮭魚 | 990
tofu | 豆腐 | 豆腐 | 160
noodles | 面条 | 麵條 | 140
tomatoes | 西红柿 | 番茄 | 210
potatoes | 土豆 | 馬鈴薯 | 190
onions | 洋葱 | 洋蔥 | 130
bananas | 香蕉 | 香蕉 | 150
grapes | 葡萄 | 葡萄 | 360
lemons | 柠檬 | 檸檬 | 170
honey | 蜂蜜 | 蜂蜜 | 560
sugar | 白糖 | 砂糖 | 120
salt | 食盐 | 食鹽 | 90
olive oil | 橄榄油 | 橄欖油 | 870
yogurt | 酸奶 | 優格 | 220
chocolate | 巧克力 | 巧克力 | 310
biscuits | 饼干 | 餅乾 | 230
soap | 肥皂 | 肥皂 | 140
shampoo | 洗发水 | 洗髮精 | 540
toothpaste | 牙膏 | 牙膏 | 270
paper towels | 纸巾 | 紙巾 | 350
batteries | 电池 | 電池 | 590
notebook | 笔记本 | 筆記本 | 280
pencils | 铅笔 | 鉛筆 | 180
umbrella | 雨伞 | 雨傘 | 1150
towel | 毛巾 | 毛巾 | 640
light bulb | 灯泡 | 燈泡 | 410
candles | 蜡烛 | 蠟燭 | 330
cucumber | 黄瓜 | 小黃瓜 | 110
carrots | 胡萝卜 | 紅蘿蔔 | 130
mushrooms | 蘑菇 | 蘑菇 | 260
watermelon | 西瓜 | 西瓜 | 430
peaches | 桃子 | 桃子 | 340
strawberries | 草莓 | 草莓 | 460
"""
GOODS = tuple(((en, hans, hant), int(cents)) for en, hans, hant, cents in _rows(_GOODS))

SECTIONS = {
    "en": ("Starters", "Mains", "Desserts", "Drinks"),
    "zh-Hans": ("凉菜", "热菜", "主食", "饮品"),
    "zh-Hant": ("涼菜", "熱菜", "主食", "飲品"),
}
# dishes by section, in the order of SECTIONS
DISHES = {
    "en": (
        "Tomato soup, Onion soup, Green salad, Garlic bread, Spring rolls, Smoked salmon, Prawn"
        " cocktail, Stuffed peppers",
        "Grilled chicken, Beef stew, Fish and chips, Vegetable curry, Lamb chops, Mushroom risotto,"
        " Roast duck, Seafood pasta, Cheeseburger, Steak pie",
        "Apple pie, Chocolate cake, Lemon tart, Ice cream, Fruit salad, Cheesecake, Rice pudding",
        "Coffee, Green tea, Orange juice, Lemonade, Sparkling water, Hot chocolate, House wine,"
        " Ginger beer",
    ),
    "zh-Hans": (
        "拍黄瓜, 皮蛋豆腐, 凉拌木耳, 口水鸡, 糖醋萝卜, 酱牛肉, 凉拌海带",
        "宫保鸡丁, 麻婆豆腐, 鱼香肉丝, 红烧肉, 清蒸鱼, 糖醋排骨, 干煸豆角,"
        " 番茄炒蛋, 回锅肉, 蒜蓉青菜,"
        " 水煮牛肉, 铁板豆腐",
        "扬州炒饭, 牛肉面, 小笼包, 葱油饼, 水饺, 白米饭, 炸酱面, 馄饨",
        "绿茶, 豆浆, 酸梅汤, 鲜榨橙汁, 菊花茶, 珍珠奶茶, 椰子汁, 冰咖啡",
    ),
    "zh-Hant": (
        "拍黃瓜, 皮蛋豆腐, 涼拌木耳, 口水雞, 糖醋蘿蔔, 滷牛肉, 涼拌海帶",
        "宮保雞丁, 麻婆豆腐, 魚香肉絲, 紅燒肉, 清蒸魚, 糖醋排骨, 乾煸四季豆, 番茄炒蛋, 回鍋肉,"
        " 蒜蓉青菜, 水煮牛肉, 鐵板豆腐",
        "揚州炒飯, 牛肉麵, 小籠包, 蔥油餅, 水餃, 白飯, 炸醬麵, 餛飩",
        "綠茶, 豆漿, 酸梅湯, 鮮榨柳橙汁, 菊花茶, 珍珠奶茶, 椰子汁, 冰咖啡",
    ),
}
PLACES = _trios("""
Airport | 机场 | 機場
Museum | 博物馆 | 博物館
Hospital | 医院 | 醫院
Library | 图书馆 | 圖書館
Station | 火车站 | 火車站
Harbour | 港口 | 港口
Stadium | 体育场 | 體育場
University | 大学 | 大學
Old Town | 老城 | 老城
Botanic Garden | 植物园 | 植物園
""")
