// The page's own words in English and Chinese, and which of the two is shown.

import { remember, remembered } from "./preferences.js";

const WORDS = {
  conversations: ["Conversations", "对话"],
  newConversation: ["New conversation", "新对话"],
  search: ["Search", "搜索"],
  exportAll: ["Export", "导出"],
  importFile: ["Import", "导入"],
  model: ["Model", "模型"],
  language: ["Language: 中文", "语言：English"],
  settings: ["Settings", "设置"],
  messages: ["Messages", "消息"],
  message: ["Message", "输入消息"],
  thinking: ["Thinking", "思考"],
  tools: ["Tools", "工具"],
  stop: ["Stop", "停止"],
  send: ["Send", "发送"],
  keys: ["Enter sends, Shift+Enter begins a line", "Enter 发送，Shift+Enter 换行"],
  cancel: ["Cancel", "取消"],
  ok: ["OK", "确定"],
  save: ["Save", "保存"],
  delete: ["Delete", "删除"],
  rename: ["Rename", "重命名"],
  copy: ["Copy", "复制"],
  copied: ["Copied", "已复制"],
  edit: ["Edit", "编辑"],
  again: ["Another answer", "重新回答"],
  retry: ["Try again", "重试"],
  answerNow: ["Answer this", "回答这条消息"],
  earlier: ["Earlier version", "上一个版本"],
  later: ["Later version", "下一个版本"],
  you: ["You", "你"],
  settingsNote: ["Of this conversation, and of the next ones that you begin. An empty field is the model's own setting.", "用于本对话以及之后新建的对话。留空表示使用模型自己的设置。"],
  system: ["System prompt", "系统提示词"],
  temperature: ["Temperature (0: greedy)", "温度（0：贪心）"],
  maxTokens: ["Tokens of an answer, at most", "回答的最大 token 数"],
  seed: ["Seed", "随机种子"],
  ofModel: ["the model's", "模型默认"],
  noSeed: ["any", "任意"],
  seedNote: ["With a seed the same question gets the same answer; another answer to it draws with the next seed.", "设定种子后，同一问题得到同一回答；重新回答时使用下一个种子。"],
  ofModelAll: ["All as the model's", "全部用模型默认"],
  theme: ["Colours: {now}", "配色：{now}"],
  auto: ["as the system's", "跟随系统"],
  light: ["light", "浅色"],
  dark: ["dark", "深色"],
  empty: ["Ask something.", "问点什么吧。"],
  thinkingNow: ["Thinking …", "思考中……"],
  thought: ["Thought for {seconds} s", "思考了 {seconds} 秒"],
  thoughtSome: ["Thought", "思考过程"],
  waiting: ["Waiting for the first word …", "等待第一个词……"],
  speed: ["{rate} tokens/s · first after {first} s · {tokens} tokens", "{rate} token/秒 · 首个 token {first} 秒 · 共 {tokens} 个 token"],
  burst: ["{tokens} tokens in {seconds} s", "{tokens} 个 token，{seconds} 秒"],
  speedNow: ["about {rate} tokens/s", "约 {rate} token/秒"],
  firstOnly: ["first after {first} s", "首个 token {first} 秒"],
  cached: ["{cached} of {prompt} prompt tokens reused", "提示词 {prompt} 个 token 中复用了 {cached} 个"],
  seedUsed: ["seed {seed}", "种子 {seed}"],
  calling: ["running …", "运行中……"],
  answering: ["Answering.", "正在回答。"],
  answered: ["Answer complete.", "回答完毕。"],
  stopped: ["Stopped by you.", "已由你停止。"],
  length: ["Cut at the limit of tokens (the setting's, or what the model's context leaves).", "达到 token 上限（设置的上限，或模型上下文的剩余空间），回答被截断。"],
  cut: ["The connection ended before the answer was complete. What came is kept.", "回答尚未完成连接就断开了，已收到的内容已保留。"],
  unfinished: ["Not complete: the page was closed, or another tab is still answering.", "未完成：页面已关闭，或另一个标签页仍在回答。"],
  tooManyRounds: [
    "The model wants to call tools again; {rounds} rounds are the most for one answer, so this call was not carried out.",
    "模型还想调用工具；一次回答最多 {rounds} 轮，所以这次调用没有执行。",
  ],
  left: ["The oldest turns ({count}) were left out of the prompt: they no longer fit the model's context, or the request.", "最早的 {count} 轮对话超出模型上下文或请求的大小，未放入提示词。"],
  unreachable: ["The server cannot be reached.", "无法连接服务器。"],
  odd: ["The server answered with status {status}.", "服务器返回状态 {status}。"],
  doRestart: ["Is `minimind serve` still running? Start it again, then try again; the conversation is kept here.", "`minimind serve` 还在运行吗？请重新启动后重试；对话已保存在这里。"],
  doKey: ["The server asks for a key (one of those it was started with). It is kept until this tab is closed.", "服务器需要密钥（启动时设置的密钥之一）。密钥保留到关闭此标签页为止。"],
  doModel: ["Choose another model above, if the server has one.", "如果服务器有其他模型，请在上方选择。"],
  doShorter: ["Shorten the message, lower the tokens of an answer, or begin a new conversation.", "请缩短消息、减小回答的 token 数，或新建对话。"],
  doWait: ["The server is busy or still loading. Wait a little, then try again.", "服务器繁忙或仍在加载，请稍后重试。"],
  doLook: ["The server's log may say more.", "服务器日志里可能有更多信息。"],
  doSettings: ["Look at the settings of this conversation.", "请检查本对话的设置。"],
  key: ["API key", "API 密钥"],
  titleOf: ["Title of the conversation", "对话标题"],
  deleteTitle: ["Delete this conversation?", "删除这个对话？"],
  deleteText: ["“{title}” is removed from this browser. Export keeps a copy.", "“{title}”将从此浏览器中删除。可先导出保留一份。"],
  imported: ["Messages added: {added} (conversations: {count}). Already here: {known}.", "已导入 {count} 个对话中的 {added} 条消息；{known} 条已存在。"],
  badFile: ["This is no file that this page exported: {why}", "这不是本页面导出的文件：{why}"],
  noStore: ["This browser keeps nothing ({why}): conversations are gone when the page is closed, or another one is begun.", "此浏览器不保存数据（{why}）：关闭页面或新建对话后，当前对话会丢失。"],
  noModels: ["The server offers no model that can chat.", "服务器没有可以聊天的模型。"],
  notFound: ["Nothing found.", "没有找到。"],
  copyFailed: ["The browser does not allow it", "浏览器不允许复制"],
  image: ["image", "图片"],
  picture: ["Picture", "图片"],
  pictureOf: ["Picture {number}: {name}", "图片 {number}：{name}"],
  removePicture: ["Remove picture {number}: {name}", "移除图片 {number}：{name}"],
  pictureAdded: ["Picture added: {name}", "已添加图片：{name}"],
  badPicture: ["{name} is no picture that this browser can open.", "{name} 不是此浏览器能打开的图片。"],
  mostPictures: ["A message has at most {most} pictures.", "一条消息最多 {most} 张图片。"],
  blind: ["This model reads words alone. Choose one that sees to send pictures.", "此模型只能读文字。请选择能看图的模型再发送图片。"],
  untitled: ["Untitled", "未命名"],
  close: ["Close", "关闭"],
  goneElsewhere: ["This conversation was deleted in another tab.", "此对话已在另一个标签页中删除。"],
  nothing: ["The model ended without a word.", "模型没有说话就结束了。"],
};

let language = remembered("language") ?? (navigator.language.startsWith("zh") ? "zh" : "en");

/** The words of a name, with {fields} filled in. */
export function say(name, fields = {}) {
  return WORDS[name][language === "zh" ? 1 : 0].replace(/\{(\w+)\}/g, (_, field) => fields[field]);
}

export function switchLanguage() {
  language = language === "en" ? "zh" : "en";
  remember("language", language);
}

/** Fills in the words of all elements that name some: as text, as accessible name, as hint of an empty field. */
export function showWords() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = say(element.dataset.text);
  for (const element of document.querySelectorAll("[data-label]")) label(element, say(element.dataset.label));
  for (const element of document.querySelectorAll("[data-hint]")) element.placeholder = say(element.dataset.hint);
  document.querySelector("#language").textContent = language === "en" ? "中文" : "English";
}

/** An accessible name, which buttons without words also show when the pointer rests on them. */
export function label(element, text) {
  element.setAttribute("aria-label", text);
  if (element.classList.contains("icon")) element.title = text;
}
